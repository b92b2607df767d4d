"""`flap estimate`: memory, disk, bytes read and time of the four stages, from headers alone. Loads and refuses nothing.

Sizes are those that the stages count themselves before they begin. Times are products over the rate at which this
machine multiplies just now, and bytes over the rate at which it writes: what a busier hour makes longer.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch

from flapcli.architecture.shape import Module
from flapcli.artifacts.stats import file_bytes, gram_bytes
from flapcli.checkpoints import Checkpoint
from flapcli.estimation.machine import LIBRARIES, Machine
from flapcli.execution.batches import Batches
from flapcli.execution.device import Runtime
from flapcli.execution.memory import Demand, in_memory_bytes
from flapcli.execution.settings import (
    ApplyOptions,
    CalibrateOptions,
    EvalOptions,
    Execution,
    PlanOptions,
    fisher_windows,
)  # fmt: skip
from flapcli.progress import Silent
from flapcli.storage.dtypes import CODES, ITEM_SIZE, dtype_name
from flapcli.storage.sizes import parse_size
from flapcli.texts.corpus import TEST_WINDOWS
from flapcli.texts.mixture import SELF, Mixture

HUB_TEXT_TOKENS, BYTES_A_TOKEN = 300_000, 4  # of WikiText2's test part, about; of English


class StageOptions(Protocol):
    """What each of the four stages is asked for."""

    @property
    def calibrate(self) -> CalibrateOptions: ...
    @property
    def plan(self) -> PlanOptions: ...
    @property
    def apply(self) -> ApplyOptions: ...
    @property
    def evaluate(self) -> EvalOptions: ...


@dataclass(frozen=True)
class Need:
    """What a stage takes: bytes of memory, of disk and that are read, and seconds, the way it would go here."""

    stage: str
    way: str
    memory: int
    disk: int
    reads: int
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """What of a model counts, from its headers: weights of a layer, bytes of the largest tensor, weights of its layers
    that a token meets, and of the head.
    """

    layer: int
    largest: int
    active: int
    head: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sizes":
        shape, family = checkpoint.shape, checkpoint.family
        prefixes = [f"{family.layer.format(i=i)}." for i in range(shape.num_layers)]
        counts = {name: prod(spec.shape) for name, spec in checkpoint.tensors.items()}
        layers = [sum(n for name, n in counts.items() if name.startswith(prefix)) for prefix in prefixes]
        taken, idle = checkpoint.setting("num_experts_per_tok") or 1, 0
        for i, layer in enumerate(shape.layers):
            if layer.num_experts:
                idle += round(shape.module_weights(i, "experts") * (1 - min(taken / layer.num_experts, 1)))
        head = checkpoint.vocabulary * shape.hidden_size
        largest = max(spec.nbytes for spec in checkpoint.tensors.values())
        return cls(max(layers), largest, sum(layers) - idle, head)


@dataclass(frozen=True)
class Estimator:
    """The stages' needs for one model on one machine."""

    checkpoint: Checkpoint
    machine: Machine
    execution: Execution
    calibrate: CalibrateOptions
    sizes: Sizes

    @property
    def size(self) -> int:
        return self.machine.runtime.dtype.itemsize

    def calibration(self) -> Need:
        """Stage 1; what the model writes itself is decoded first."""
        options, shape = self.calibrate, self.checkpoint.shape
        demand = Demand(options.seqlen, options.gram, options.fisher)
        streamed, memory = self._way(demand, self.machine.runtime)
        tokens = options.nsamples * options.seqlen
        sampled = fisher_windows(options.nsamples) if options.fisher else 0
        states = tokens * shape.hidden_size * self.size
        disk = file_bytes(shape, "F32" if options.gram else None)
        if streamed:
            disk += states * 2 + states // options.nsamples * sampled * (shape.num_layers + 2)
            memory += min(states, parse_size(self.execution.activation_memory, "--activation-memory"))
            memory += max(gram_bytes(shape, i) for i in range(shape.num_layers)) if options.gram else 0
        # There, and of every layer there again and back, which takes what two ways there do.
        back = sampled * options.seqlen * (4 * self.sizes.active + 3 * self.sizes.head)
        work = tokens * self.sizes.active + back
        seconds = work / self.rate(demand) + self._sums() / self._float32() + self._sampling(demand)
        passes = 2 if streamed and options.fisher else 1
        reads = self.checkpoint.nbytes * passes
        return Need("calibrate", _words(streamed), memory, disk, reads, seconds + (reads + disk) / self.machine.writes)

    def planning(self) -> Need:
        """Stage 2, which reads vectors alone."""
        stats = file_bytes(self.checkpoint.shape, None)
        return Need("plan", "no model", LIBRARIES + 3 * stats, 10**5, stats, 3 + stats / self.machine.writes)

    def pruning(self, options: ApplyOptions, written: int) -> Need:
        """Stage 3, which writes so many bytes; least squares reads Gram matrices, and runs layers where sequential."""
        shape, nbytes = self.checkpoint.shape, self.checkpoint.nbytes
        memory, reads, seconds = self.machine.imported + 2 * self.sizes.largest, nbytes, 0.0
        if options.compensate == "lstsq":
            grams = [gram_bytes(shape, i) for i in range(shape.num_layers)]
            memory, reads = memory + 4 * max(grams), reads + sum(grams)
            seconds = sum(self._channels(i, m) ** 2 * (self._channels(i, m) / 3 + shape.hidden_size)
                          for i in range(shape.num_layers) for m in shape.modules) / self._float32()  # fmt: skip
        if options.sequential:
            tokens = self.calibrate.nsamples * self.calibrate.seqlen
            memory += 2 * tokens * shape.hidden_size * self.size + self.sizes.layer * self.size
            seconds += 2 * tokens * self.sizes.active / self.rate(Demand(self.calibrate.seqlen))
            seconds += self._sums() / self._float32()
        way = "layer by layer" if options.sequential else "tensor by tensor"
        return Need("apply", way, memory, written, reads, seconds + (reads + written) / self.machine.writes)

    def evaluation(self, options: EvalOptions, texts: tuple[str, ...], kept: float) -> Need:
        """Stage 4 on perplexity: both models one after the other, `kept` being what is left of the dense one's work."""
        runtime = Runtime.of_eval(self.execution, options.dtype)
        demand = Demand(options.seqlen, logits=True)
        streamed, memory = self._way(demand, runtime)
        tokens = sum(windows_of(text, options) for text in texts) * options.seqlen
        memory += tokens * self.checkpoint.shape.hidden_size * runtime.dtype.itemsize if streamed else 0
        shares = kept + (1 if options.baseline else 0)
        seconds = tokens * shares * (self.sizes.active + self.sizes.head) / self.rate(demand, runtime)
        reads = round(self.checkpoint.nbytes * shares)
        seconds += reads / self.machine.writes
        return Need("eval", _words(streamed), memory, 10**4, reads, seconds)

    def _way(self, demand: Demand, runtime: Runtime) -> tuple[bool, int]:
        """Whether a stage would go layer by layer, and the bytes that it then holds but for hidden states."""
        whole = in_memory_bytes(self.checkpoint, runtime, demand)
        wish, size = self.execution.stream, runtime.dtype.itemsize
        if not (whole > self.machine.free_memory if wish is None else wish):
            return False, self.machine.imported + whole
        batch = 4 * 1024 * self.checkpoint.shape.intermediate_size * 4
        return True, self.machine.imported + max(2 * self.sizes.layer, self.sizes.head) * size + batch

    def rate(self, demand: Demand, runtime: Runtime | None = None) -> float:
        """Multiply-adds a second in batches of the size that a stage would choose."""
        runtime = runtime or self.machine.runtime
        batch = Batches(demand.seqlen, runtime.device, runtime.batch_size, Silent(), demand.backward)
        return self.machine.multiplies(runtime.dtype, batch.size * demand.seqlen, self.checkpoint.shape.hidden_size)

    def _float32(self) -> float:
        return self.machine.multiplies(torch.float32, 1024, self.checkpoint.shape.hidden_size)

    def _channels(self, layer: int, module: Module) -> int:
        return self.checkpoint.shape.channels(layer, module)

    def _sums(self) -> int:
        """Multiply-adds of the Gram sums of all windows; 0 where none are kept."""
        shape, tokens = self.checkpoint.shape, self.calibrate.nsamples * self.calibrate.seqlen
        each = (self._channels(i, m) ** 2 for i in range(shape.num_layers) for m in shape.modules if m != "experts")
        return tokens * sum(each) if self.calibrate.gram else 0

    def _sampling(self, demand: Demand) -> float:
        """Seconds in which the model writes its own part of the text, a token of every window of a batch at a time."""
        mixture = Mixture.read(str(self.calibrate.dataset))
        own = dict(zip(mixture.sources, mixture.counts(self.calibrate.nsamples), strict=True)).get(SELF, 0)
        if not own:
            return 0.0
        batch = Batches(demand.seqlen, self.machine.runtime.device, self.machine.runtime.batch_size, Silent()).size
        rate = self.machine.multiplies(self.machine.runtime.dtype, batch, self.checkpoint.shape.hidden_size)
        return own * demand.seqlen * (self.sizes.active + self.sizes.head) / rate


@dataclass(frozen=True)
class Estimate:
    """What the stages need for a model, and what this machine has: free bytes, multiply-adds and bytes a second."""

    model: str
    parameters: int
    bytes: int
    stored_as: str
    device: str
    dtype: str
    free_memory: int
    free_disk: int
    multiplies: float
    writes: float
    stages: list[Need]


def estimate(
    checkpoint: Checkpoint, stages: StageOptions, execution: Execution, folder: Path, name: str | None = None
) -> Estimate:
    """Of a run into `folder`; `name` is what the user calls the model."""
    machine = Machine.here(execution, stages.calibrate.dtype, folder)
    shape, dense = checkpoint.shape, Sizes.of(checkpoint)
    estimator = Estimator(checkpoint, machine, execution, stages.calibrate, dense)
    kept = kept_share(checkpoint, stages.plan)
    texts = stages.evaluate.perplexity or (Mixture.read(str(stages.calibrate.dataset)).sources[0],)
    return Estimate(
        name or checkpoint.name, shape.parameters, checkpoint.nbytes, checkpoint.stored_as,
        str(machine.runtime.device), dtype_name(machine.runtime.dtype), machine.free_memory, machine.free_disk,
        estimator.rate(Demand(stages.calibrate.seqlen)), machine.writes,
        [
            estimator.calibration(), estimator.planning(),
            estimator.pruning(stages.apply, written_bytes(checkpoint, stages.apply, kept)),
            estimator.evaluation(stages.evaluate, texts, kept),
        ],
    )  # fmt: skip


def kept_share(checkpoint: Checkpoint, options: PlanOptions) -> float:
    """Which share of all parameters a plan leaves, about."""
    shape = checkpoint.shape
    if options.target:
        target = options.target.of(shape)
        return min(target.limit / target.dense(shape), 1.0)
    return 1 - options.ratio * shape.prunable_weights / shape.parameters


def windows_of(text: str, options: EvalOptions) -> int:
    """About how many windows perplexity reads of a text."""
    path = Path(text)
    tokens = path.stat().st_size // BYTES_A_TOKEN if path.is_file() else HUB_TEXT_TOKENS
    there = TEST_WINDOWS.get(text, max(tokens // options.seqlen, 1))
    return min(there, options.perplexity_windows or there)


def written_bytes(checkpoint: Checkpoint, options: ApplyOptions, kept: float) -> int:
    """Bytes of the pruned folder's weights where `kept` of all parameters stay."""
    if options.dtype is None and not checkpoint.path.is_file():
        return round(checkpoint.nbytes * kept)
    return round(checkpoint.shape.parameters * kept * ITEM_SIZE[CODES[options.dtype or "float32"]])


def _words(streamed: bool) -> str:
    return "layer by layer" if streamed else "in memory"
