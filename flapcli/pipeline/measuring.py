"""The part of `flap calibrate` that computes: where, in which of the two ways, and from which checkpoint on."""

import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from flapcli.calibrate import measure
from flapcli.checkpoint import Checkpoint
from flapcli.checkpoint.write import parse_size
from flapcli.device import dtype_name, pick_device, pick_dtype
from flapcli.elimination import eliminator
from flapcli.errors import FlapError
from flapcli.loading import quiet_transformers
from flapcli.memory import should_stream
from flapcli.pipeline.common import CalibrateOptions, Compute, Scale, versions
from flapcli.pipeline.texts import Texts, windows_sha256
from flapcli.progress import Progress, Silent
from flapcli.ranks import Ranks
from flapcli.recording import NotFiniteError
from flapcli.resume import Resume, discard_all, key_of
from flapcli.rundir import explain, require_space
from flapcli.stats import Calibration, GramDtype, StatsHeader, StatsWriter, file_bytes, gram_bytes, save_stats
from flapcli.streamed import stream

GRAM_CODES: dict[str, GramDtype] = {"float32": "F32", "bfloat16": "BF16"}


def write_stats(
    out: Path,
    checkpoint: Checkpoint,
    options: CalibrateOptions,
    text: str | None,
    compute: Compute,
    force: bool,
    progress: Progress,
    scale: Scale,
    ranks: Ranks | None,
) -> StatsHeader:
    """Measure and write `out`, going on where a killed run of the same stopped; `force` begins anew."""
    quiet_transformers()
    checkpoint.shape  # noqa: B018  an unknown family or a corrupt checkpoint is refused before any text is asked for
    ranks = ranks or Ranks(0, 1, 0)
    progress = Silent() if ranks.rank else progress
    device = _device(compute.device, ranks)
    dtype = pick_dtype(options.dtype, device)
    streamed = not scale.device_map and any(
        ranks.agree(should_stream(checkpoint, dtype, device, options.gram, scale.stream, progress))
    )
    texts = Texts(out, checkpoint, options, device, dtype, scale.device_map, streamed)
    windows = texts.windows(compute, force, progress, ranks)
    _agree(ranks, checkpoint, windows, dtype)
    header = _header(checkpoint, options, windows, dtype, text, streamed)
    facts = {"header": header.model_dump(mode="json"), "device": device.type, "rank": [ranks.rank, ranks.size]}
    with Resume(out, key_of(facts, windows.tobytes()), ranks.rank, ranks.size) as resume:
        if force:
            resume.discard()
        share = windows[ranks.share(len(windows))]
        job = _Job(out, checkpoint, header, share, device, dtype, compute, scale, progress, resume, ranks, texts.model)
        try:
            job.check_space()
            job.streamed() if streamed else job.in_memory()
        except NotFiniteError:
            resume.discard()
            raise
        except OSError as error:
            raise explain(error, resume.folder) from error
    ranks.agree(None)  # until rank 0 has written all, each may have to go on
    discard_all(out)
    return header


def _header(
    checkpoint: Checkpoint,
    options: CalibrateOptions,
    windows: NDArray[np.int64],
    dtype: torch.dtype,
    text: str | None,
    streamed: bool,
) -> StatsHeader:
    asked = asdict(options)
    calibration = Calibration(
        **{key: value for key, value in asked.items() if key not in ("dtype", "gram", "gram_dtype", "fisher")},
        tokens=int(windows.size),
        dtype=dtype_name(dtype),
        source_sha256=text,
        windows_sha256=windows_sha256(windows),
        mode="streamed" if streamed else "in-memory",
    )
    return StatsHeader(model=checkpoint.shape, calibration=calibration, settings=asked, versions=versions())


def _agree(ranks: Ranks, checkpoint: Checkpoint, windows: NDArray[np.int64], dtype: torch.dtype) -> None:
    """Raise FlapError where ranks would add up sums of unlike things."""
    mine = {"model": checkpoint.fingerprint, "text": windows_sha256(windows), "--dtype": dtype_name(dtype)}
    first, *others = ranks.agree(mine)
    for rank, theirs in enumerate(others, 1):
        if unlike := [name for name in first if theirs[name] != first[name]]:
            raise FlapError(
                f"rank {rank} and rank 0 do not calibrate the same, they differ in: {', '.join(unlike)} (files, "
                "versions of transformers, or what --dtype auto stands for): make them alike, or give --dtype"
            )


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device of `--device`; of several processes on one machine each takes its own GPU."""
    device = pick_device(name)
    if ranks.size > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class _Job:
    """One calibration, decided in all its options; `windows` are this rank's."""

    out: Path
    checkpoint: Checkpoint
    header: StatsHeader
    windows: NDArray[np.int64]
    device: torch.device
    dtype: torch.dtype
    compute: Compute
    scale: Scale
    progress: Progress
    resume: Resume
    ranks: Ranks
    model: PreTrainedModel | None

    @property
    def gram(self) -> GramDtype | None:
        settings = self.header.settings
        return GRAM_CODES[str(settings["gram_dtype"])] if settings["gram"] else None

    @property
    def fisher(self) -> bool:
        return bool(self.header.settings["fisher"])

    def check_space(self) -> None:
        """Say how large Gram matrices are. Raises FlapError where the disk is too full for what will be written."""
        shape = self.checkpoint.shape
        needed = file_bytes(shape, self.gram) if self.ranks.rank == 0 else 0
        if self.gram:
            layers = [gram_bytes(shape, layer, self.gram) for layer in range(shape.num_layers)]
            self.progress.note(
                f"Gram matrices take {sum(layers) / 1e9:.2f} GB on disk ({max(layers) / 1e9:.3f} GB a layer, "
                f"{self.header.settings['gram_dtype']})"
            )
        states = self.windows.size * shape.hidden_size * self.dtype.itemsize
        if self.header.calibration.mode == "streamed" and self.fisher:  # and a layer's gradients
            needed += (shape.num_layers + 3) * states
            self.progress.note(
                "Fisher information layer by layer keeps hidden states between all layers on disk until it is done: "
                f"{(shape.num_layers + 3) * states / 1e9:.2f} GB"
            )
        elif self.header.calibration.mode == "streamed":  # a layer's input and output
            needed += 2 * states
        elif self.gram:  # the sums so far
            needed += file_bytes(shape, "F32")
        require_space(self.out.parent, max(needed - self.resume.nbytes, 0))

    def in_memory(self) -> None:
        measured = measure(
            self.checkpoint, self.windows, self.device, self.dtype, self.compute.batch_size, self.gram is not None,
            self.progress, self.resume, self.ranks, self.scale.device_map, self.model, self.fisher,
        )  # fmt: skip
        if self.ranks.rank:
            return
        found = measured.modules, measured.influences, measured.grams, measured.fisher
        layers = self.checkpoint.shape.num_layers if self.gram and self.fisher else 0
        with self.progress.task("eliminate", layers, "layers") if layers else nullcontext(lambda _: None) as advance:
            save_stats(self.out, self.header, *found, self.gram or "F32", eliminator(self.checkpoint, advance))

    def streamed(self) -> None:
        limit = parse_size(self.scale.activation_memory, "--activation-memory")
        growing = self.resume.ready() / "stats.safetensors"
        writer = StatsWriter(growing, self.header, self.gram, resume=True) if self.ranks.rank == 0 else None
        stream(
            self.checkpoint, self.windows, self.device, self.dtype, self.compute.batch_size, self.gram is not None,
            self.progress, self.resume, writer, self.ranks, limit, self.fisher,
        )  # fmt: skip
        if writer:
            with writer:  # checks that all is there
                pass
            os.replace(growing, self.out)
