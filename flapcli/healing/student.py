"""The pruned model as it is trained: low-rank adapters on its projections, or all of its decoder layers but experts."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model
from flapcli.execution.settings import Execution, HealOptions
from flapcli.healing.forward import Forward
from flapcli.storage.dtypes import dtype_name, torch_dtype

SHORT = 256  # tokens, whose squares of attention a layer can keep
SCALE = 2  # an adapter's product counts so many times, as is usual


class Student:
    """A pruned checkpoint in memory; `trained` are the parameters that change, float32, by name.

    `layers` are those whose output is compared. Raises FlapError where nothing can be trained.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: HealOptions,
        runtime: Runtime,
        execution: Execution,
        layers: Sequence[int] = (),
    ) -> None:
        self.checkpoint, self.runtime, self.full = checkpoint, runtime, options.full
        # What is trained as a whole is float32 throughout, and multiplied in the runtime's type by autocast.
        dtype = torch.float32 if options.full else runtime.dtype
        self.model = load_model(checkpoint, dtype, runtime.device, execution.device_map)
        self.model.requires_grad_(False)
        layers_at = checkpoint.family.layer.removesuffix(".{i}")
        if options.full:
            known = dict(self.model.named_parameters())
            matrices = (name for name, spec in checkpoint.tensors.items() if len(spec.shape) < 3)  # no experts
            self.trained = {name: known[name] for name in matrices if name.startswith(f"{layers_at}.")}
        else:
            self.trained = _adapted(self.model.get_submodule(layers_at), f"{layers_at}.", options)
        if not self.trained:
            raise FlapError(f"{checkpoint.name}: its decoder layers hold nothing that can be trained")
        for parameter in self.trained.values():
            parameter.requires_grad_()
        if execution.checkpoint_activations:
            _checkpoint_activations(self.model)
        self.forward = Forward(self.model, checkpoint, layers)

    @property
    def autocast(self) -> AbstractContextManager[None]:
        """Within, matrices are multiplied in the type that the model runs in."""
        dtype = self.runtime.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.runtime.device.type, dtype)

    def attention(self, seqlen: int) -> AbstractContextManager[None]:
        """Within, short windows' attention is written out as products on a CPU: its fused way back takes longer."""
        written_out = self.runtime.device.type == "cpu" and seqlen <= SHORT
        return sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()

    @property
    def weights(self) -> list[str]:
        """The checkpoint's tensors that training changes."""
        return list(self.trained) if self.full else [f"{name}.weight" for name, _ in _adapters(self.model)]

    def _adapter(self, name: str) -> Any:
        return self.model.get_submodule(name.removesuffix(".weight"))

    @torch.no_grad()
    def written(self, name: str) -> torch.Tensor:
        """A changed tensor as it is written: in the type that it has on disk, rounded once."""
        spec = self.checkpoint.tensors[name]
        if self.full:
            made = self.trained[name].cpu()
        else:
            delta = self._adapter(name).get_delta_weight("default")
            made = self.checkpoint.read(name).float() + delta.float().cpu()
        if not torch.isfinite(made).all():
            raise FlapError(f"{name} is not finite after training: lower --lr")
        rounded = made.to(torch_dtype(spec.dtype))
        if not torch.isfinite(rounded).all():
            raise FlapError(f"{name} has values beyond {dtype_name(rounded.dtype)} after training: lower --lr")
        return rounded

    @torch.no_grad()
    def settle(self) -> None:
        """From now on the model computes with what is written."""
        for name in self.weights:
            place = self.trained[name] if self.full else self._adapter(name).get_base_layer().weight
            made = self.written(name)
            place.copy_(made.to(place.dtype))
        for _, adapter in _adapters(self.model) if not self.full else ():
            adapter.enable_adapters(False)


def _adapted(layers: torch.nn.Module, prefix: str, options: HealOptions) -> dict[str, torch.nn.Parameter]:
    """Put adapters of rank r on every matrix that is a module of its own; returns their parameters, by full names.

    The product of a new one is zero. Experts, which lie in one tensor, have none: peft is shown the layers alone, since
    it would put some on experts of models that it knows.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in layers.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    names = [name for name in names if layers.get_submodule(name).weight.numel()]  # type: ignore[operator]
    if names:
        torch.manual_seed(options.seed)
        transposed = isinstance(layers.get_submodule(names[0]), Conv1D)
        config = LoraConfig(
            r=options.rank, lora_alpha=SCALE * options.rank, target_modules=names, lora_dropout=0.0,
            fan_in_fan_out=transposed,
        )  # fmt: skip
        inject_adapter_in_model(config, layers)
    found = {f"{prefix}{name}": p for name, p in layers.named_parameters() if ".lora_" in name}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


def _adapters(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Have layers forget their activations and compute them anew in the backward pass.

    transformers does so where a layer is in training mode; what lies in it stays in evaluation mode, so that no dropout
    comes to life.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not model.supports_gradient_checkpointing:
        raise FlapError(f"{type(model).__name__} can't forget its activations: leave out --checkpoint-activations")
    newer = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.24 or before
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
