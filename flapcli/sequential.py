"""Least squares that repairs what came before: every output projection fitted on the pruned model's activations.

One decoder layer at a time, attention before MLP, over all calibration windows. With h the residual stream of the
dense model, h' that of the pruned one, x the kept channels that the pruned layer makes of h', and y the dense
stream behind the module minus h' before it (the dense module's output plus the stream's error so far):

    W' = W0 + argmin over D of mean |(W0 + D) x + b - y|² + lambda |D|²

where W0 is the closed form from the Gram matrices. (Layer-wise reconstruction against dense targets on the pruned
prefix is that of SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774, and of its kin; the stream's error in the
target took SmolLM2's perplexity at 20%, K and V repeated, from 28.4 to 27.8 in a trial.)
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoint.base import Checkpoint
from flapcli.compensation import Compensation, cut_of
from flapcli.device import TORCH_DTYPES, Batches
from flapcli.errors import FlapError
from flapcli.families import Family
from flapcli.hidden import HiddenStates
from flapcli.layers import Call, Front, Layers, states_of
from flapcli.loading import empty_model
from flapcli.plan import Plan
from flapcli.progress import Advance, Progress
from flapcli.refits import Refit, Refits
from flapcli.resume import Resume
from flapcli.rundir import require_space
from flapcli.shape import MODULES, Module

ACTIVATION_MEMORY = 8 * 10**9  # both streams stay in memory up to this many bytes, else in files
PASSES = 3  # of all windows through a layer


@dataclass(frozen=True)
class How:
    """What decides the fits besides plan and statistics: `ridge` of `refined`, `dtype` as written (None: as stored).

    `stay` are the layers that the pruned checkpoint has.
    """

    ridge: float
    dtype: torch.dtype | None
    stay: Collection[int]


class _Reached(Exception):
    """The projection that was waited for has its input: the rest of the layer is of no interest."""


class Stream:
    """The residual stream of one of the two models before the layer at hand, read and written batch by batch."""

    def __init__(self, hidden: HiddenStates) -> None:
        self.hidden, self._turns = hidden, 0

    def write(self, part: slice, states: torch.Tensor) -> None:
        self.hidden.write(part, states.cpu())

    def turn(self) -> None:
        """All was written: from now on that is read."""
        self._turns += 1
        self.hidden.turn(self._turns)
        self.hidden.forget(self._turns - 1)


class Taps:
    """What goes into a layer's output projections, and the residual stream between its modules."""

    def __init__(self, layer: torch.nn.Module, family: Family) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self._until = ""
        places = {"middle": family.middle} | {module: family.module(module).output for module in MODULES}
        self.handles = [
            layer.get_submodule(path).register_forward_pre_hook(self._hook(name)) for name, path in places.items()
        ]

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.inputs[name] = inputs[0]
            if name == self._until:
                raise _Reached

        return note

    @contextmanager
    def until(self, module: Module) -> Iterator[None]:
        """Run the layer no further than to this module's output projection."""
        self._until = module
        try:
            with suppress(_Reached):
                yield
        finally:
            self._until = ""

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass
class Sequential:
    """One run over the layers."""

    checkpoint: Checkpoint
    plan: Plan
    compensation: Compensation
    how: How
    windows: NDArray[np.int64]
    device: torch.device
    front: Front
    dense: Stream
    pruned: Stream
    batches: Batches
    fits: Refits

    def run(self, model: torch.nn.Module, advance: Advance) -> None:
        self._embed()
        for index, layer, _ in Layers(self.checkpoint, model, self.device).from_(0):
            if index not in self.how.stay:
                self._pass(self.dense, index, layer, advance)
                advance((PASSES - 1) * self.windows.size)
                continue
            taps = Taps(layer, self.checkpoint.family)
            self._fit_attention(index, layer, taps, advance)
            self._fit_mlp(index, layer, taps, advance)
            taps.close()
            self._pass(self.pruned, index, layer, advance)

    def _embed(self) -> None:
        def step(part: slice) -> None:
            states = self.front.run(torch.from_numpy(self.windows[part]))
            self.dense.write(part, states)
            self.pruned.write(part, states)

        self.batches.run(len(self.windows), step, lambda _tokens: None)
        self.front.unload()
        self.dense.turn()
        self.pruned.turn()

    def _call(self, index: int, part: slice) -> Call:
        return self.front.call(index, torch.from_numpy(self.windows[part]))

    def _read(self, stream: Stream, part: slice) -> torch.Tensor:
        return stream.hidden.read(part).to(self.device)

    def _fit_attention(self, index: int, layer: torch.nn.Module, taps: Taps, advance: Advance) -> None:
        """Fit on the stream before the layer; with that the dense stream moves behind it."""
        refit = self._begin(index, "attention")

        def step(part: slice) -> None:
            args, kwargs = self._call(index, part)
            before = self._read(self.dense, part)
            after = states_of(layer(before, *args, **kwargs))
            if part.start == 0:
                self._check(layer, taps, before, after)
            after = after.cpu()  # takes memory, which nothing may once the sums have the batch
            wanted = taps.inputs["middle"].float()
            before = self._read(self.pruned, part)
            with taps.until("attention"):
                layer(before, *args, **kwargs)
            refit.add(taps.inputs["attention"], wanted - before.float())
            self.dense.write(part, after)

        self.batches.run(len(self.windows), step, advance)
        self.dense.turn()
        self._finish(refit, layer)

    def _check(self, layer: torch.nn.Module, taps: Taps, before: torch.Tensor, after: torch.Tensor) -> None:
        """Raise FlapError where a module does more to the stream than add its output projection's output."""
        family, middle = self.checkpoint.family, taps.inputs["middle"]
        ends: dict[Module, tuple[torch.Tensor, torch.Tensor]] = {"attention": (before, middle), "mlp": (middle, after)}
        for module, (start, end) in ends.items():
            added = layer.get_submodule(family.module(module).output)(taps.inputs[module])
            rounding = 2 * torch.finfo(end.dtype).eps * float(end.abs().max())
            if not torch.allclose(end - start, added, rtol=0, atol=rounding + 0.01 * float(added.abs().max())):
                raise FlapError(
                    f"--sequential knows no layers like those of family {family.name}, whose {module} adds something "
                    "else to the residual stream than its output projection's output: leave it out"
                )

    def _fit_mlp(self, index: int, layer: torch.nn.Module, taps: Taps, advance: Advance) -> None:
        """Fit on what the refitted attention makes of the pruned stream."""
        refit = self._begin(index, "mlp")

        def step(part: slice) -> None:
            args, kwargs = self._call(index, part)
            with taps.until("mlp"):
                layer(self._read(self.pruned, part), *args, **kwargs)
            refit.add(taps.inputs["mlp"], self._read(self.dense, part).float() - taps.inputs["middle"].float())

        self.batches.run(len(self.windows), step, advance)
        self._finish(refit, layer)

    def _begin(self, index: int, module: Module) -> Refit:
        output, known = self.checkpoint.family.output(index, module), self.checkpoint.tensors
        weight, bias = (
            self.checkpoint.read(name) if name in known else None for name in (f"{output}.weight", f"{output}.bias")
        )
        cut = cut_of(self.checkpoint, self.plan, index, module)
        hidden_size = self.checkpoint.shape.hidden_size
        return Refit(cut, weight, bias, hidden_size, self.compensation, self.how.ridge, self.device)

    def _finish(self, refit: Refit, layer: torch.nn.Module) -> None:
        fit, written, cut = refit.fit(), self._written(refit), refit.cut
        fit = replace(fit, weight=fit.weight.to(written))
        projection = layer.get_submodule(self.checkpoint.family.module(cut.module).output)
        refit.install(projection, fit, written, self.dense.hidden.dtype)
        self.fits.put(cut, fit)

    def _written(self, refit: Refit) -> torch.dtype:
        like = next(iter(self.checkpoint.tensors.values())).dtype
        stored = TORCH_DTYPES[like] if refit.weight is None else refit.weight.dtype
        return self.how.dtype or stored

    def _pass(self, stream: Stream, index: int, layer: torch.nn.Module, advance: Advance) -> None:
        """Move a stream behind the layer as it is."""

        def step(part: slice) -> None:
            args, kwargs = self._call(index, part)
            stream.write(part, states_of(layer(self._read(stream, part), *args, **kwargs)))

        self.batches.run(len(self.windows), step, advance)
        stream.turn()


def refit(
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    compensation: Compensation,
    how: How,
    windows: NDArray[np.int64],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    progress: Progress,
    reserve: int = 0,
) -> Refits:
    """Fit every output projection of the layers that stay, layer by layer, into files of `folder`.

    `windows` (nsamples, seqlen) are token ids, `dtype` what the layers run in, which is also that of the streams
    between them. Never more than one layer in memory, besides its sums. Raises FlapError as calibration does, and
    where the disk has no room for the fits and `reserve` bytes, which are written after them.
    """
    model = empty_model(checkpoint, dtype, device)
    sizes = (len(windows), windows.shape[1], checkpoint.shape.hidden_size)
    stream_bytes = windows.size * sizes[2] * dtype.itemsize
    in_memory = 2 * stream_bytes <= ACTIVATION_MEMORY
    # Three of a stream: one is read, while of the other what is read and what is written are there.
    require_space(folder, reserve + _fits_bytes(checkpoint, plan, how) + (0 if in_memory else 3 * stream_bytes))
    with ExitStack() as stack:
        files = [stack.enter_context(Resume(folder / "streams" / name, name)) for name in ("dense", "pruned")]
        dense, pruned = (Stream(HiddenStates(sizes, dtype, in_memory, own)) for own in files)
        run = Sequential(
            checkpoint=checkpoint,
            plan=plan,
            compensation=compensation,
            how=how,
            windows=windows,
            device=device,
            front=Front(checkpoint, model, device),
            dense=dense,
            pruned=pruned,
            batches=Batches(windows.shape[1], device, batch_size, progress),
            fits=Refits(folder),
        )
        total = PASSES * windows.size * checkpoint.shape.num_layers
        with torch.inference_mode(), progress.task("refit", total, "tokens x passes") as advance:
            run.run(model, advance)
        for own in files:
            own.discard()
    return run.fits


def _fits_bytes(checkpoint: Checkpoint, plan: Plan, how: How) -> int:
    """Bytes of all fits' weights as they are written."""
    total = 0
    for index in how.stay:
        for module in MODULES:
            if spec := checkpoint.tensors.get(f"{checkpoint.family.output(index, module)}.weight"):
                kept = len(plan.kept(index, module)) * checkpoint.shape.channels_per_unit(module)
                total += spec.shape[0] * kept * (how.dtype or TORCH_DTYPES[spec.dtype]).itemsize
    return total
