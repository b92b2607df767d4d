"""Least squares that repairs what came before: every output projection fitted on the pruned model's activations.

One decoder layer at a time, attention before MLP, over all calibration windows (METHOD.md, Sequential fit).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flapcli.architecture.family import Family
from flapcli.architecture.flap_section import MadeBy
from flapcli.architecture.shape import MODULES, Module
from flapcli.artifacts.stats import Stats
from flapcli.checkpoints import Checkpoint
from flapcli.execution.device import Runtime
from flapcli.execution.hidden_states import HiddenStates, ResidualStream
from flapcli.execution.layerwise import Forward, Layer, LayerwiseModel
from flapcli.execution.memory import stay_in_memory
from flapcli.execution.settings import Execution
from flapcli.progress import Advance, Progress
from flapcli.pruning.compensation import ClosedForm
from flapcli.pruning.cut import cut_of
from flapcli.pruning.layout import Layout, Output
from flapcli.pruning.sequential_fit import CannotFitError, ProjectionFit, StoredFits
from flapcli.pruning.sharpness import STEPS, final_norm_of, sharpness
from flapcli.storage.atomic import explain, require_space
from flapcli.storage.dtypes import torch_dtype
from flapcli.storage.resume import Resume, key_of
from flapcli.texts.windows import windows_of_stats

PASSES = 3  # of all windows through a layer


class SequentialFit:
    """A fit before anything is written, on the text of the statistics, in the type that they were measured in.

    `runtime.dtype` is also that of the streams between layers. Raises as `Runtime.of` and `windows_of_stats`.
    """

    def __init__(
        self, checkpoint: Checkpoint, stats: Stats, stats_path: Path, execution: Execution, ridge: float
    ) -> None:
        self.checkpoint, self.ridge = checkpoint, ridge
        self.runtime = Runtime.of(execution, stats.header.calibration.dtype)
        self.windows = windows_of_stats(stats.header, stats_path, checkpoint)  # (nsamples, seqlen)

    def resume(self, out: Path, made_by: MadeBy, anew: bool) -> Resume:
        """Beside `out`, what a killed run of this very fit left; nothing where it is to begin `anew`."""
        facts = {
            "made by": made_by.model_dump(mode="json"),
            "runtime": [self.runtime.device.type, str(self.runtime.dtype)],
        }
        found = Resume(out, key_of(facts, self.windows.tobytes()))
        if anew:
            found.discard()
        return found

    @contextmanager
    def stored(
        self, resume: Resume, layout: Layout, closed_form: ClosedForm, progress: Progress
    ) -> Iterator[StoredFits]:
        """The fits of every output projection that is written, in files of `resume` that are gone once they were used.

        Never more than one layer in memory, besides its sums. What is killed goes on with the layer that it was at.
        Raises FlapError as calibration does, and where the disk has no room for streams, fits and the pruned
        checkpoint, which is written after them.
        """
        fits = StoredFits(resume.folder)
        try:
            self._run(resume, layout, closed_form, fits, progress)
        except CannotFitError:
            resume.discard()
            raise
        except OSError as error:
            raise explain(error, resume.folder) from error
        yield fits
        resume.discard()

    def _run(
        self, resume: Resume, layout: Layout, closed_form: ClosedForm, fits: StoredFits, progress: Progress
    ) -> None:
        windows, dtype = self.windows, self.runtime.dtype
        layerwise = LayerwiseModel(self.checkpoint, windows, self.runtime, progress)
        hidden_size, count = self.checkpoint.shape.hidden_size, self.checkpoint.shape.num_layers
        stream_bytes = windows.size * hidden_size * dtype.itemsize
        in_memory = stay_in_memory(2 * stream_bytes)
        # Of each stream what is read and what is written: with the latter half-written, all begins with the former.
        require_space(resume.parent.parent, layout.nbytes + _fits_bytes(layout) + 4 * stream_bytes - resume.nbytes)
        size = (*windows.shape, hidden_size)
        dense, pruned = (
            ResidualStream(HiddenStates(size, dtype, in_memory, resume, name, self.runtime.device))
            for name in ("dense", "pruned")
        )
        run = _Run(self, layout, closed_form, layerwise, dense, pruned, fits)
        with (
            torch.inference_mode(),
            progress.task("refit", (PASSES * count + STEPS) * windows.size, "tokens x passes") as advance,
        ):
            run.over_layers(progress, advance)


def _fits_bytes(layout: Layout) -> int:
    """Bytes of all fits' weights as they are written, without what is masked."""
    outputs = [step for step in layout.steps if isinstance(step, Output)]
    return sum(o.weight.shape[0] * len(o.cut.kept) * torch_dtype(o.weight.dtype).itemsize for o in outputs)


class _ProjectionReachedError(Exception):
    """The projection that was waited for has its input: the rest of the layer is of no interest."""


class LayerInputs:
    """What goes into a layer's output projections, by module, and the residual stream `between` its modules."""

    def __init__(self, layer: torch.nn.Module, family: Family) -> None:
        self.of: dict[str, torch.Tensor] = {}
        self._until: Module | None = None
        paths: dict[str, str] = {module: family.module(module).output for module in MODULES}
        if family.experts:
            raise CannotFitError(f"--sequential fits no experts, which family {family.name} has: leave it out")
        if family.between_modules is None:
            raise CannotFitError(
                f"--sequential fits attention before the MLP, which stand side by side in family {family.name}: leave "
                "it out"
            )
        paths["between"] = family.between_modules
        self._rows: tuple[int, ...] = ()
        self._handles = [layer.register_forward_pre_hook(self._see_rows)] + [
            layer.get_submodule(path).register_forward_pre_hook(self._hook(name)) for name, path in paths.items()
        ]

    def _see_rows(self, _layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._rows = inputs[0].shape[:-1]

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_submodule: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.of[name] = inputs[0].reshape(*self._rows, inputs[0].shape[-1])  # some code lays all tokens in a row
            if name == self._until:
                raise _ProjectionReachedError

        return note

    @property
    def between(self) -> torch.Tensor:
        return self.of["between"]

    @contextmanager
    def until(self, module: Module) -> Iterator[None]:
        """Run the layer no further than to this module's output projection."""
        self._until = module
        try:
            with suppress(_ProjectionReachedError):
                yield
        finally:
            self._until = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class _Run:
    """One run over the layers."""

    fit: SequentialFit
    layout: Layout
    closed_form: ClosedForm
    layerwise: LayerwiseModel
    dense: ResidualStream
    pruned: ResidualStream
    fits: StoredFits

    def over_layers(self, progress: Progress, advance: Advance) -> None:
        checkpoint, windows, start = self.fit.checkpoint, self.fit.windows, self._restored()
        if start is None:
            start = 0
            self._embed()
        else:
            progress.note(f"going on with layer {start} of {checkpoint.shape.num_layers} (from 0)")
        advance(start * PASSES * windows.size)
        for layer in self.layerwise.layers(range(start, checkpoint.shape.num_layers)):
            if layer.index not in self.layout.layers.written_index:
                self._pass(self.dense, layer, advance)
                advance((PASSES - 1) * windows.size)
                self.pruned.hidden.pass_on(layer.index)
            else:
                inputs = LayerInputs(layer.module, checkpoint.family)
                self._fit_attention(layer, inputs, advance)
                self._fit_mlp(layer, inputs, advance)
                inputs.close()
                self._pass(self.pruned, layer, advance)
            for stream in (self.dense, self.pruned):
                stream.hidden.forget(layer.index)
        self._fit_sharpness(advance)

    def _restored(self) -> int | None:
        """The last layer whose input an earlier run left whole in both streams, which now read it, or None."""
        hidden = self.dense.hidden, self.pruned.hidden
        start = max(set.intersection(*(set(states.saved()) for states in hidden)), default=None)
        if start is not None:
            for states in hidden:
                states.restore(start)
        return start

    def _embed(self) -> None:
        def take(part: slice, states: torch.Tensor) -> None:
            self.dense.write(part, states)
            self.pruned.write(part, states)

        self.layerwise.embed(take)
        self.dense.hidden.save(0)
        self.pruned.hidden.save(0)

    def _fit_attention(self, layer: Layer, inputs: LayerInputs, advance: Advance) -> None:
        """Fit on the stream before the layer; with that the dense stream moves behind it."""
        fit = self._begin(layer.index, "attention")

        def step(part: slice, forward: Forward) -> None:
            before = self.dense.read(part)
            after = forward(before)
            if part.start == 0:
                self._check(layer.module, inputs, before, after)
            wanted = inputs.between.float()
            before = self.pruned.read(part)
            with inputs.until("attention"):
                forward(before)
            fit.add(inputs.of["attention"], wanted - before.float())
            self.dense.write(part, after)

        self.layerwise.run(layer, step, advance)
        self.dense.hidden.save(layer.index + 1)
        self._finish(fit, layer.module)

    def _check(self, layer: torch.nn.Module, inputs: LayerInputs, before: torch.Tensor, after: torch.Tensor) -> None:
        """Raise FlapError where a module does more to the stream than add its output projection's output."""
        family, between = self.fit.checkpoint.family, inputs.between
        for module, start, end in zip(MODULES, (before, between), (between, after), strict=True):
            added = layer.get_submodule(family.module(module).output)(inputs.of[module])
            rounding = 2 * torch.finfo(end.dtype).eps * float(end.abs().max())
            if not torch.allclose(end - start, added, rtol=0, atol=rounding + 0.01 * float(added.abs().max())):
                raise CannotFitError(
                    f"--sequential knows no layers like those of family {family.name}, whose {module} adds something "
                    "else to the residual stream than its output projection's output: leave it out"
                )

    def _fit_mlp(self, layer: Layer, inputs: LayerInputs, advance: Advance) -> None:
        """Fit on what the fitted attention makes of the pruned stream."""
        fit = self._begin(layer.index, "mlp")

        def step(part: slice, forward: Forward) -> None:
            with inputs.until("mlp"):
                forward(self.pruned.read(part))
            fit.add(inputs.of["mlp"], self.dense.read(part).float() - inputs.between.float())

        self.layerwise.run(layer, step, advance)
        self._finish(fit, layer.module)

    def _begin(self, index: int, module: Module) -> ProjectionFit:
        checkpoint = self.fit.checkpoint
        cut = cut_of(checkpoint, self.layout.plan, index, module)
        return ProjectionFit(cut, checkpoint, self.closed_form, self.fit.ridge, self.layerwise.device)

    def _finish(self, projection_fit: ProjectionFit, layer: torch.nn.Module) -> None:
        fit, cut = projection_fit.fit(), projection_fit.cut
        written = torch_dtype(self.layout.output_dtype(cut.layer, cut.module))
        fit = replace(fit, weight=fit.weight.to(written))
        projection = layer.get_submodule(self.fit.checkpoint.family.module(cut.module).output)
        projection_fit.install(projection, fit, written, self.dense.hidden.dtype)
        self.fits.put(cut, fit)

    def _fit_sharpness(self, advance: Advance) -> None:
        """One factor on all logits, which the norm before the head takes, where it has weights that do."""
        if names := final_norm_of(self.fit.checkpoint):
            factor = sharpness(self.layerwise, self.dense, self.pruned, names, advance)
            if factor is not None and factor > 0:
                self.fits.put_factor(names, factor)

    def _pass(self, stream: ResidualStream, layer: Layer, advance: Advance) -> None:
        """Move a stream behind the layer as it is."""

        def step(part: slice, forward: Forward) -> None:
            stream.write(part, forward(stream.read(part)))

        self.layerwise.run(layer, step, advance)
        stream.hidden.save(layer.index + 1)
