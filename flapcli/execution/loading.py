"""Checkpoints as transformers models in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers  # whose names load on first use: not all stages need what models import
from transformers.utils import logging

from flapcli.architecture import modeling_flap
from flapcli.checkpoints.checkpoint import Checkpoint
from flapcli.errors import FlapError, first_line
from flapcli.execution.batches import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quiet_transformers() -> None:
    """One progress bar and one voice are enough: ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, device_map: str | None = None
) -> "PreTrainedModel":
    """The model in evaluation mode, on one device or spread by accelerate as `device_map` says.

    Raises FlapError where transformers can't load it.
    """
    quiet_transformers()
    checkpoint.shape  # noqa: B018  refuses a corrupt checkpoint in our words, before transformers does
    try:
        if checkpoint.is_converted:
            model, told = _from_tensors(checkpoint, dtype)
        else:
            model, told = _class_of(checkpoint).from_pretrained(
                checkpoint.path,
                dtype=dtype,
                trust_remote_code=checkpoint.hub.trust_remote_code,
                device_map=device_map,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which `_refuse_gaps` names
            )
        _refuse_gaps(checkpoint, told)
        if device_map:
            return (_spread(model, device_map) if checkpoint.is_converted else model).eval()
        return model.to(device).eval()
    except (FlapError, MemoryError):
        raise
    except Exception as error:  # a configuration may ask for what is not installed, or does not exist
        if out_of_memory(error):
            raise FlapError(
                f"{checkpoint.name}: out of memory on {device} while loading: use another --device, or --stream where "
                "the command has it"
            ) from error
        raise FlapError(f"{checkpoint.name}: transformers can't load it: {first_line(error)}") from error


def _refuse_gaps(checkpoint: Checkpoint, told: dict[str, Any]) -> None:
    """Raise FlapError where transformers made weights up, or left some of the checkpoint's out."""
    left_out = [name for name in told["unexpected_keys"] if checkpoint.own_name(name) in checkpoint.tensors]
    mismatched = told["mismatched_keys"]
    for what, names in (
        ("finds no weights for", told["missing_keys"]),
        ("by config.json expects other shapes for", [key if isinstance(key, str) else key[0] for key in mismatched]),
        ("leaves out", left_out),
    ):
        if names:
            listed = ", ".join(str(name) for name in sorted(names, key=str)[:4])
            raise FlapError(f"{checkpoint.name}: transformers {what} {len(names)} tensors: {listed}")


def _spread(model: "PreTrainedModel", device_map: str) -> "PreTrainedModel":
    """A model in memory over all devices, as from_pretrained spreads one from a folder."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules
    memory = get_balanced_memory(model, no_split_module_classes=whole) if device_map == "auto" else None
    return dispatch_model(model, infer_auto_device_map(model, memory, no_split_module_classes=whole))


def layers_of(model: "PreTrainedModel", checkpoint: Checkpoint) -> list[torch.nn.Module]:
    """The decoder's layers, in order."""
    return [model.get_submodule(checkpoint.family.layer.format(i=i)) for i in range(checkpoint.shape.num_layers)]


@contextmanager
def in_place_of(modules: Sequence[torch.nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Every one of these modules does this when called, while the code around them is the model's own."""
    own = [vars(module).get("forward") for module in modules]  # accelerate puts one in the class's place
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del module.forward
            if before:
                module.forward = before


def empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, flap: dict[str, Any] | None = None
) -> "PreTrainedModel":
    """The model with all weights on the meta device: no memory, only what it computes from its configuration.

    With `flap`, in the sizes of such a section of config.json. Buffers (rotary frequencies) are real, on `device`.
    Raises FlapError where transformers can't build it.
    """
    from accelerate import init_empty_weights

    quiet_transformers()
    config = checkpoint.load_config()
    config.architectures = [checkpoint.family.architecture]
    kind = _class_of(checkpoint)
    if flap:
        config.flap = flap
        kind = getattr(modeling_flap, f"Flap{checkpoint.family.architecture}")
    try:
        with init_empty_weights(include_buffers=False):
            if kind is transformers.AutoModelForCausalLM:
                model = kind.from_config(config, dtype=dtype, trust_remote_code=checkpoint.hub.trust_remote_code)
            else:
                model = kind._from_config(config, dtype=dtype)
    except Exception as error:  # as in load_model
        raise FlapError(f"{checkpoint.name}: transformers can't build it: {first_line(error)}") from error
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.requires_grad_(False).eval()


def _class_of(checkpoint: Checkpoint) -> "type[PreTrainedModel]":
    """A folder pruned by flap is read by our own code, never by the code that lies in it."""
    if checkpoint.flap and checkpoint.flap.modules:
        return getattr(modeling_flap, f"Flap{checkpoint.family.architecture}")
    return transformers.AutoModelForCausalLM


def _from_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Build from tensors read one by one, for what from_pretrained can't read or reads slowly; and what was told."""
    tensors = {name: checkpoint.read(name).to(dtype) for name in checkpoint.tensors}
    config = checkpoint.load_config()
    config.architectures = [checkpoint.family.architecture]
    kind = _class_of(checkpoint)
    if kind is transformers.AutoModelForCausalLM:
        kind = kind._model_mapping[type(config)]
    return kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
