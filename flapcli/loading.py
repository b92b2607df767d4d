"""Checkpoints as transformers models in memory."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from flapcli import modeling
from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.safetensors import first_line
from flapcli.errors import FlapError


def quiet_transformers() -> None:
    """One progress bar and one voice are enough: ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode. Raises FlapError where transformers can't load it."""
    quiet_transformers()
    checkpoint.shape  # noqa: B018  refuses a corrupt checkpoint in our words, before transformers does
    try:
        if checkpoint.path.is_file():
            model = _from_tensors(checkpoint, dtype)
        else:
            model = _class_of(checkpoint).from_pretrained(
                checkpoint.path, dtype=dtype, trust_remote_code=checkpoint.hub.trust_remote_code
            )
        return model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FlapError(f"{checkpoint.name}: transformers can't load it: {first_line(error)}") from error


def _class_of(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """A folder pruned by flap is read by our own code, never by the code that lies in it."""
    if "modules" in checkpoint.config.get("flap", {}):
        return getattr(modeling, f"Flap{checkpoint.family.architecture}")
    return AutoModelForCausalLM


def _from_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Build from tensors read one by one, for sources that from_pretrained reads slowly (GGUF)."""
    tensors = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    config = checkpoint.load_config()
    config.architectures = [checkpoint.family.architecture]
    architecture = AutoModelForCausalLM._model_mapping[type(config)]
    return architecture.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
