"""OSSCAR (Meng et al. 2024, arXiv 2403.12983) by its authors' own solver, as fmchisel packages it, for quality.py.

fmchisel runs it within llmcompressor, which takes torch below 2.8 and transformers below 5. Its solver and what packs
the result take neither, so these two modules are loaded alone, into this environment, and driven as llmcompressor's
sequential pipeline does: layer by layer on what the pruned layers before make of the text, o_proj and down_proj of a
layer at once. Every layer loses as many KV groups and neurons, as the package asks for.
"""

import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from peers import counts, put_aside

from flapcli.checkpoints import open_checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.layerwise import LayerwiseModel
from flapcli.execution.loading import layers_of, load_model
from flapcli.execution.settings import Execution
from flapcli.progress import Silent
from flapcli.texts.corpus import calibration_windows

PACKAGE = "fmchisel==0.1.2"
Hessians = dict[torch.nn.Module, torch.Tensor]


def solver(folder: Path) -> tuple[ModuleType, ModuleType] | None:
    """The package's modules that sparsify a weight and pack a model, put into `folder` by pip; None without it."""
    if not put_aside(PACKAGE, "fmchisel", folder, "osscar"):
        return None
    stand_in("llmcompressor.modifiers.factory", ModifierFactory=SimpleNamespace(refresh=lambda: None))
    stand_in("llmcompressor.modifiers.obcq.sgpt_sparsify", SGPT_PRECISION=torch.float32)
    utils = "fmchisel.pruning.osscar.utils"
    return import_module(f"{utils}.osscar_sparsify"), import_module(f"{utils}.helpers")


def stand_in(name: str, **values: object) -> None:
    """A module that holds no more than what is asked of it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(values)


@torch.no_grad()
def osscar(name: str, nsamples: int, ratio: float, folder: Path) -> tuple[Path, float] | None:
    """The pruned model's folder, and the ratio achieved; None where the package can't be had."""
    if (found := solver(folder / "fmchisel")) is None:
        return None
    sparsify, helpers = found
    checkpoint, runtime = open_checkpoint(name), Runtime.of(Execution(), "bfloat16")
    tokenizer = checkpoint.load_tokenizer()
    windows = calibration_windows("pydoc", tokenizer, nsamples, 128, 0)
    model = load_model(checkpoint, runtime.dtype, runtime.device)
    dense, pruned = folder / f"dense-{checkpoint.fingerprint[:12]}", folder / f"{checkpoint.fingerprint[:12]}-{ratio}"
    for place in (dense, pruned):
        tokenizer.save_pretrained(place)
    model.save_pretrained(dense)
    groups, neurons, achieved = counts(model, ratio)
    layerwise = LayerwiseModel(checkpoint, windows, runtime, Silent(), model)
    states: list[torch.Tensor] = [torch.empty(0)] * len(windows)
    layerwise.embed(lambda part, given: states.__setitem__(part, list(given)))
    asked = {"self_attn.o_proj": (model.config.num_key_value_heads, groups),
             "mlp.down_proj": (model.config.intermediate_size, neurons)}  # fmt: skip
    for index, layer in enumerate(layers_of(model, checkpoint)):
        targets = {layer.get_submodule(path): sizes for path, sizes in asked.items() if sizes[1]}
        hessians = measured(sparsify, targets, lambda i=index: run(layerwise, i, states, keep=False))
        for module, (of, gone) in targets.items():
            module.weight.copy_(sparsify.sparsify_weight(module, hessians, of - gone, 1, of)[1])
        run(layerwise, index, states, keep=True)
    model.save_pretrained(pruned)
    helpers.pack(str(pruned), neurons, groups, str(dense))
    for spare in (dense, Path(f"{pruned}-uncompressed")):
        shutil.rmtree(spare)
    return pruned, achieved


def measured(sparsify: ModuleType, modules: Iterable[torch.nn.Module], go: Callable[[], None]) -> Hessians:
    """Of each module the products of its inputs, which come as `go` is called."""
    found = {m: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for m in modules}

    def hear(module: torch.nn.Module, given: tuple[torch.Tensor], _made: torch.Tensor) -> None:
        sparsify.accumulate_hessian(given[0], module, found[module], 0)

    hooks = [module.register_forward_hook(hear) for module in found]
    go()
    for hook in hooks:
        hook.remove()
    return found


def run(layerwise: LayerwiseModel, index: int, states: list[torch.Tensor], keep: bool) -> None:
    """All windows through a layer; its output takes the place of its input where that is asked for."""

    def step(part: slice) -> None:
        made = layerwise.through(index, part)(torch.stack(states[part]))
        if keep:
            states[part] = list(made)

    layerwise.batches.run(len(states), step)
