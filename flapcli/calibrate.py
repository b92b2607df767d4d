"""Stage 1: one dense forward pass over the calibration windows, and what it says of every channel."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from flapcli.checkpoint.base import Checkpoint
from flapcli.checkpoint.write import raw_bytes
from flapcli.device import Batches
from flapcli.fisher import loss_gradient, track
from flapcli.loading import load_model
from flapcli.moments import Moments
from flapcli.progress import Progress
from flapcli.ranks import Ranks
from flapcli.recording import Key, Norms, Recorder, complete, fisher, influence
from flapcli.resume import Resume
from flapcli.rundir import atomic_file
from flapcli.safetensors_io import StreamWriter, TensorSpec, read_header, read_into
from flapcli.shape import MODULES, Module
from flapcli.stats import Influence, ModuleStats

# A checkpoint is taken no sooner after the last one than this, and than 20 times what that one took.
SECONDS_BETWEEN, TIMES_ITS_COST = 10.0, 20


@dataclass
class Measured:
    """Everything a stats file holds besides its header."""

    modules: dict[tuple[int, Module], ModuleStats]
    influences: list[Influence]
    grams: dict[tuple[int, Module], NDArray[np.float32]] | None
    fisher: dict[tuple[int, Module], NDArray[np.float32]] | None


def measure(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None,
    gram: bool,
    progress: Progress,
    resume: Resume | None = None,
    ranks: Ranks | None = None,
    device_map: str | None = None,
    model: PreTrainedModel | None = None,
    with_fisher: bool = False,
) -> Measured:
    """Run this rank's `windows` (nsamples, seqlen) through the dense decoder and return the statistics of all ranks.

    `with_fisher` adds a backward pass through the activations, which gives no weight a gradient.
    Accumulators are float64 (Gram sums float32) whatever `dtype` the model runs in. With `resume`, goes on
    after the batches that an earlier run saved there. `model` is the checkpoint's where it is loaded already.
    Away from rank 0 what is returned is of no use.
    Raises FlapError on activations that are not finite and where memory does not suffice.
    """
    ranks = ranks or Ranks(0, 1, 0)
    model = model or load_model(checkpoint, dtype, device, device_map)
    device = next(p.device for p in model.parameters() if not p.is_meta)  # what accelerate offloads is meta
    decoder = model.get_submodule(checkpoint.family.decoder)  # without the lm_head
    recorder = Recorder(checkpoint, model, gram, device, with_fisher)
    if with_fisher:
        track(model)
    saved = Saved(resume, recorder) if resume else None
    done = saved.restore() if saved else 0
    if done:
        progress.note(f"going on after window {done} of {len(windows)}")

    def step(part: slice) -> None:
        recorder.abandon()
        ids = torch.from_numpy(windows[part]).to(device)
        states = decoder(input_ids=ids, use_cache=False)[0]
        if with_fisher:
            states.backward(loss_gradient(model.get_output_embeddings(), states, ids))
        recorder.commit()
        ranks.check()

    batches = Batches(windows.shape[1], device, batch_size, progress, backward=with_fisher)
    with torch.enable_grad() if with_fisher else torch.inference_mode():
        with progress.task("calibrate", windows.size, "tokens") as advance:
            advance(done * windows.shape[1])

            def taken(tokens: int) -> None:
                """Not in the step: out of memory here is no reason to take in the batch again."""
                if saved:
                    saved.after(tokens // windows.shape[1])
                advance(tokens)

            batches.run(len(windows), step, taken, done)
        return _complete(checkpoint, recorder, ranks)


def _complete(checkpoint: Checkpoint, recorder: Recorder, ranks: Ranks) -> Measured:
    measured = Measured({}, [], {} if recorder.gram else None, {} if recorder.fisher else None)
    for layer in range(checkpoint.shape.num_layers):
        measured.influences.append(influence(recorder, layer, ranks))
        for module in MODULES:
            key = (layer, module)
            weight = f"{checkpoint.family.output(*key)}.weight"
            norms = Norms.of(checkpoint.read(weight)) if ranks.rank == 0 and weight in checkpoint.tensors else None
            measured.modules[key], gram = complete(recorder, key, norms, ranks)
            if gram is not None and measured.grams is not None and ranks.rank == 0:
                measured.grams[key] = gram
        if measured.fisher is not None:
            measured.fisher |= {(layer, module): found for module, found in fisher(recorder, layer, ranks).items()}
    return measured


class Saved:
    """The recorder's sums in the resume folder, with the number of windows that they are of."""

    def __init__(self, resume: Resume, recorder: Recorder) -> None:
        self.resume, self.recorder = resume, recorder
        self._next = time.monotonic() + SECONDS_BETWEEN
        self._windows = 0

    @property
    def path(self) -> Path:
        return self.resume.folder / "moments.safetensors"

    def restore(self) -> int:
        """Take in what an earlier run saved; returns how many windows that is."""
        if not self.resume.found or not self.path.exists():
            return 0
        header = read_header(self.path)
        values = {}
        for name, spec in header.tensors.items():
            value = torch.empty(spec.shape, dtype=torch.float64 if spec.dtype == "F64" else torch.float32)
            read_into(self.path, header.offsets[name], raw_bytes(value))
            values[name] = value
        for key in self.recorder.moments:
            name = _name(key)
            if f"{name}.mean" in values:
                count = int(header.metadata[name])
                self.recorder.moments[key] = Moments(count, values[f"{name}.mean"], values[f"{name}.m2"])
            if f"{name}.gram" in values:
                self.recorder.grams[key] = values[f"{name}.gram"].to(self.recorder.device)
        self._windows = int(header.metadata["windows"])
        return self._windows

    def after(self, windows: int) -> None:
        """Save now and then; `windows` more have been taken in."""
        self._windows += windows
        start = time.monotonic()
        if start < self._next:
            return
        tensors: dict[str, torch.Tensor] = {}
        metadata = {"windows": str(self._windows)}
        for key, moments in self.recorder.moments.items():
            if moments.count:
                tensors |= {f"{_name(key)}.mean": moments.mean, f"{_name(key)}.m2": moments.m2}
                metadata[_name(key)] = str(moments.count)
        tensors |= {f"{_name(key)}.gram": total for key, total in self.recorder.grams.items()}
        codes = {torch.float64: "F64", torch.float32: "F32"}
        specs = [TensorSpec(name, tuple(value.shape), codes[value.dtype]) for name, value in tensors.items()]
        self.resume.ready()
        with atomic_file(self.path) as scratch, StreamWriter(scratch, specs, metadata) as out:
            for name, value in tensors.items():
                out.write(name, raw_bytes(value))
        now = time.monotonic()
        self._next = now + max(SECONDS_BETWEEN, TIMES_ITS_COST * (now - start))


def _name(key: Key) -> str:
    layer, module = key
    return f"layers.{layer}.{module}"
