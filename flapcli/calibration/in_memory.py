"""Calibration of a model in memory: one dense forward pass over the windows, and what it says of every channel.

Fisher information takes a pass of its own, back and forth over some of them.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from flapcli.architecture.shape import Module
from flapcli.artifacts.stats_writer import LayerStats
from flapcli.calibration.fisher import Sample, gradient_before, loss_gradient
from flapcli.calibration.moments import Moments
from flapcli.calibration.recorder import Key, Recorder, fisher_of, layer_stats_of
from flapcli.calibration.workload import Workload
from flapcli.checkpoints.column_norms import ColumnNorms
from flapcli.checkpoints.tensor_file import load_tensors, save_tensors
from flapcli.execution.batches import STREAM, Batches, Within
from flapcli.execution.device import float64_device
from flapcli.execution.layerwise import LayerwiseModel
from flapcli.execution.loading import layers_of, load_model
from flapcli.progress import Advance
from flapcli.storage.resume import Pauses, Resume


def measure(work: Workload) -> Iterator[LayerStats]:
    """Run this rank's windows through the dense decoder; returns the statistics of all ranks, layer by layer.

    Accumulators are float64 (Gram sums float32) whatever dtype the model runs in. With `resume`, goes on after the
    batches that an earlier run saved there. Every rank must take all layers; away from rank 0 they are of no use.
    Raises FlapError on activations that are not finite and where memory does not suffice.
    """
    checkpoint, windows, sample = work.checkpoint, work.windows, work.fisher
    work.progress.doing(f"loading {checkpoint.name}")
    model = work.model or load_model(checkpoint, work.runtime.dtype, work.runtime.device, work.device_map)
    device = next(p.device for p in model.parameters() if not p.is_meta)  # what accelerate offloads is meta
    decoder = model.get_submodule(checkpoint.family.decoder)  # without the lm_head
    recorder = Recorder(checkpoint, model, work.gram, device, sample is not None)
    saved = Saved(work.resume, recorder) if work.resume else None
    done = saved.restore() if saved else 0
    if done:
        work.progress.note(f"going on after window {min(done, len(windows))} of {len(windows)}")

    def step(part: slice) -> None:
        recorder.begin(part)
        ids = torch.from_numpy(windows[part]).to(device)
        decoder(input_ids=ids, use_cache=False)
        recorder.commit()
        work.ranks.check()

    seqlen = windows.shape[1]

    def taken(advance: Advance) -> Advance:
        """Not in the step: out of memory here is no reason to take in the batch again."""

        def note(tokens: int) -> None:
            if saved:
                saved.after(tokens // seqlen)
            advance(tokens)

        return note

    batches = Batches(seqlen, device, work.runtime.batch_size, work.progress, instead=STREAM)
    # Tensors of inference mode, some of which models keep, can't take part in a backward pass.
    mode = torch.no_grad() if sample else torch.inference_mode()
    total = windows.size + (sample.numbers.numel() if sample else 0)
    with mode, work.progress.task("calibrate", total, "tokens") as whole:
        whole(done * seqlen)
        with Within(layers_of(model, checkpoint), whole) as advance:
            batches.run(len(windows), step, taken(advance), min(done, len(windows)))
        if sample:
            recorder.keep_gates_only()
            model.requires_grad_(False)
            runtime = replace(work.runtime, device=device)
            layerwise = LayerwiseModel(checkpoint, windows, runtime, work.progress, model)
            _back(work, sample, layerwise, recorder, taken(whole), max(done - len(windows), 0))
    return _layers(work, recorder)


def _back(
    work: Workload, sample: Sample, layerwise: LayerwiseModel, recorder: Recorder, taken: Advance, done: int
) -> None:
    """Fisher information of the sample's windows from the one after `done` of them on.

    Of a batch all layers' inputs are there, but the graph of one layer alone, which runs once more for that.
    """
    layerwise = layerwise.backward_over(work.windows[sample.places])

    def step(part: slice) -> None:
        recorder.begin(part)
        inputs, forwards = [layerwise.embedded(part)], []
        for layer in range(work.checkpoint.shape.num_layers):
            forwards.append(layerwise.through(layer, part))
            inputs.append(forwards[-1](inputs[-1]))
        gradient = loss_gradient(layerwise.logits, inputs.pop(), sample.numbers[part], sample.start)
        while forwards:
            gradient = gradient_before(forwards.pop(), inputs.pop(), gradient)
        recorder.commit()
        work.ranks.check()

    layerwise.batches.run(len(layerwise.windows), step, taken, done)


@torch.inference_mode()
def _layers(work: Workload, recorder: Recorder) -> Iterator[LayerStats]:
    checkpoint, ranks = work.checkpoint, work.ranks
    for layer in range(checkpoint.shape.num_layers):
        norms: dict[Module, ColumnNorms | None] = dict.fromkeys(checkpoint.family.modules)
        for module in norms if ranks.rank == 0 else ():
            if checkpoint.family.output_weight(layer, module) in checkpoint.tensors:
                weight = checkpoint.read_output(layer, module)
                norms[module] = ColumnNorms.of(weight.to(float64_device(recorder.device)))
        found = layer_stats_of(recorder, layer, norms, ranks)
        yield found._replace(fisher=fisher_of(recorder, layer, ranks)) if work.fisher else found


class Saved:
    """The recorder's sums in the resume folder, with the number of windows that they are of."""

    def __init__(self, resume: Resume, recorder: Recorder) -> None:
        self.resume, self.recorder = resume, recorder
        self.path = resume.folder / "moments.safetensors"
        self._pauses = Pauses()
        self._windows = 0

    def restore(self) -> int:
        """Take in what an earlier run saved; returns how many windows that is."""
        if not self.resume.found or not self.path.exists():
            return 0
        values, metadata = load_tensors(self.path)
        for key in self.recorder.moments:
            name = _name(key)
            if f"{name}.mean" in values:
                count = int(metadata[name])
                self.recorder.moments[key] = Moments(count, values[f"{name}.mean"], values[f"{name}.m2"])
            if f"{name}.gram" in values:
                self.recorder.grams[key] = values[f"{name}.gram"].to(self.recorder.device)
        self._windows = int(metadata["windows"])
        return self._windows

    def after(self, windows: int) -> None:
        """Save now and then; `windows` more have been taken in."""
        self._windows += windows
        if not self._pauses.is_due:
            return
        self.recorder.settle()
        tensors: dict[str, torch.Tensor] = {}
        metadata = {"windows": str(self._windows)}
        for key, moments in self.recorder.moments.items():
            if moments.count:
                tensors |= {f"{_name(key)}.mean": moments.mean, f"{_name(key)}.m2": moments.m2}
                metadata[_name(key)] = str(moments.count)
        tensors |= {f"{_name(key)}.gram": total for key, total in self.recorder.grams.items()}
        self.resume.ready()
        with self._pauses.saving():
            save_tensors(self.path, tensors, metadata)


def _name(key: Key) -> str:
    layer, module = key
    return f"layers.{layer}.{module}"
