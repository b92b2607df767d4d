"""What the dense model says of the windows, kept on disk: it runs once, and is not in memory beside the student."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flapcli.checkpoints.shards import raw_bytes
from flapcli.errors import FlapError
from flapcli.execution.batches import Batches
from flapcli.execution.divergence import Likeliest
from flapcli.healing.teacher import OnlineTeacher, Targets
from flapcli.progress import Progress
from flapcli.storage.atomic import explain, move_file, require_space
from flapcli.storage.dtypes import torch_dtype
from flapcli.storage.resume import Resume
from flapcli.storage.safetensors_file import Header, StreamWriter, TensorSpec, read_header, read_into

FORMAT = "flap-teacher/1"
TOGETHER = 16  # windows in one tensor of the file


@dataclass(frozen=True)
class _Read:
    """Of windows that were read from the file."""

    hidden: list[torch.Tensor]
    whole: Likeliest

    def rows(self, part: slice) -> Likeliest:
        parts = (None if each is None else each[part] for each in (self.whole.ids, self.whole.rest))
        return Likeliest(self.whole.logprobs[part], *parts)


@dataclass(frozen=True)
class TeacherCache:
    """The file `path` of `windows` (n, seqlen): of each window the `k` likeliest tokens at its predicting places.

    float16 log probabilities and int32 ids, the log probability of all other tokens in float32; hidden states behind
    `layers`, of `width`, in bfloat16. `key` says what all of it depends on; `device` is where targets are wanted.
    """

    path: Path
    key: str
    windows: NDArray[np.int64]
    start: int
    k: int
    layers: tuple[int, ...] = ()
    width: int = 0
    device: torch.device | None = None

    def group(self, first: int) -> list[TensorSpec]:
        """The tensors of `TOGETHER` windows from this one on."""
        seqlen, count = self.windows.shape[1], min(TOGETHER, len(self.windows) - first)
        places = (count, seqlen - self.start)
        kinds = [("logprobs", (*places, self.k), "F16"), ("ids", (*places, self.k), "I32"), ("rest", places, "F32")]
        kinds += [(f"hidden.{layer}", (count, seqlen, self.width), "BF16") for layer in self.layers]
        return [TensorSpec(f"{first}.{name}", shape, dtype) for name, shape, dtype in kinds]

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for first in range(0, len(self.windows), TOGETHER) for spec in self.group(first)]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    def find(self) -> "CachedTeacher | None":
        """The file where it is this one, None where none is or another. Raises FlapError for what is not flap's."""
        header, key = found_teacher(self.path)
        return CachedTeacher(self, header) if header and key == self.key else None

    def write(self, teacher: OnlineTeacher, batch_size: int | None, progress: Progress) -> None:
        """Run the dense model over all windows; killed, the next run goes on where this one stopped."""
        resume = Resume(self.path, self.key)
        require_space(self.path.parent, max(self.nbytes - resume.nbytes, 0))
        metadata = {"flap": json.dumps({"format": FORMAT, "key": self.key})}
        try:
            growing = resume.ready() / self.path.name
            with StreamWriter(growing, self.specs, metadata, resume=True) as out:
                self._fill(out, teacher, batch_size, progress)
            move_file(growing, self.path)
        except OSError as error:
            raise explain(error, self.path) from error
        resume.discard()

    def _fill(self, out: StreamWriter, teacher: OnlineTeacher, batch_size: int | None, progress: Progress) -> None:
        groups = out.written // len(self.group(0))  # one that was begun is made anew
        out.rewind(groups * len(self.group(0)))
        seqlen = self.windows.shape[1]
        batches = Batches(seqlen, teacher.forward.device, batch_size, progress)
        with progress.task("teacher", self.windows.size, "tokens") as advance:
            advance(groups * TOGETHER * seqlen)
            for first in range(groups * TOGETHER, len(self.windows), TOGETHER):
                windows, made = self.windows[first : first + TOGETHER], list[list[torch.Tensor]]()

                def step(part: slice, windows: NDArray[np.int64], made: list[list[torch.Tensor]]) -> None:
                    made.append(self._of(teacher.targets(part, torch.from_numpy(windows[part])), part))

                batches.run(len(windows), lambda part, w=windows, m=made: step(part, w, m), advance)  # type: ignore[misc]
                for spec, parts in zip(self.group(first), zip(*made, strict=True), strict=True):
                    out.write(spec.name, raw_bytes(torch.cat(parts)))

    def _of(self, targets: Targets, part: slice) -> list[torch.Tensor]:
        """A batch's part of every tensor of a group."""
        places = self.windows.shape[1] - self.start
        rows = [targets.rows(slice(row * places, (row + 1) * places)) for row in range(part.stop - part.start)]
        columns = zip(*((row.logprobs.half(), row.ids, row.rest) for row in rows), strict=True)
        logprobs, ids, rest = (torch.stack([value for value in column if value is not None]) for column in columns)
        return [value.cpu() for value in (logprobs, ids.int(), rest, *(state.bfloat16() for state in targets.hidden))]


def found_teacher(path: Path) -> tuple[Header | None, str | None]:
    """Header and key of what is kept at `path`, None where nothing is. Raises FlapError for what is not flap's."""
    if not path.exists():
        return None, None
    try:
        header = read_header(path)
        said = json.loads(header.metadata.get("flap", "null")) or {}
    except (FlapError, ValueError):
        said = {}
    if said.get("format") != FORMAT:
        raise FlapError(f"{path} exists and is not what flap keeps of a teacher ({FORMAT}): move it away")
    return header, said.get("key")


@dataclass(frozen=True)
class CachedTeacher:
    """Reads the file window by window."""

    cache: TeacherCache
    header: Header

    def targets(self, places: slice, ids: torch.Tensor) -> Targets:
        names = [spec.name.partition(".")[2] for spec in self.cache.group(0)]
        logprobs, tokens, rest, *hidden = (
            torch.stack([self._read(name, window) for window in range(places.start, places.stop)]).to(self.cache.device)
            for name in names
        )
        rows = logprobs.flatten(0, 1).float(), tokens.flatten(0, 1).long(), rest.flatten(0, 1)
        return _Read(hidden, Likeliest(*rows))

    def _read(self, name: str, window: int) -> torch.Tensor:
        """One window's part of a tensor."""
        first = window // TOGETHER * TOGETHER
        spec = self.header.tensors[f"{first}.{name}"]
        value = torch.empty(spec.shape[1:], dtype=torch_dtype(spec.dtype))
        size = spec.nbytes // spec.shape[0]
        read_into(self.cache.path, self.header.offsets[spec.name] + (window - first) * size, raw_bytes(value))
        return value
