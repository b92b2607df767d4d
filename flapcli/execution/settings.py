"""What the stages can be asked for, each a dataclass with its defaults, and how models are run. Imports nothing heavy.

What decides an artifact is in the stage's options, which the artifact records and the cache compares; what changes
no result beyond rounding is in `Execution`.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from flapcli.architecture.shape import AttentionUnit
from flapcli.errors import UsageError, only_with
from flapcli.storage.dtypes import Dtype, StoredDtype
from flapcli.storage.sizes import parse_size

if TYPE_CHECKING:
    from flapcli.artifacts.target import Target

Method = Literal["flap", "wanda-sp", "mag-sp", "depth", "experts"]
Metric = Literal["IFV", "WIFV", "WIFN", "FISHER", "FISHER-OBS"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]
Compensate = Literal["none", "bias", "lstsq"]

Loss = Literal["kl", "ce", "kl+ce"]

# Default of --ridge by whether the fit is sequential (METHOD.md, Sequential fit).
RIDGES = {False: 0.01, True: 0.3}


@dataclass(frozen=True)
class Execution:
    """Where and in what portions a model runs, and how size is coped with.

    `batch_size` None: about 1024 tokens on a CPU, more on a GPU. `stream`: layer by layer; None: where it must.
    `threads` None: torch's own choice. `cache_requests` keeps tasks' built prompts; `checkpoint_activations` computes
    them anew in a backward pass.
    """

    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    stream: bool | None = None
    activation_memory: str = "8GB"
    device_map: str | None = None
    rank_timeout: float = 60
    cache_requests: bool = False
    checkpoint_activations: bool = False


def fisher_windows(count: int) -> int:
    """Of how many of the calibration's windows Fisher information is made: every eighth, 128 at least, or all."""
    return min(count, max(128, count // 8))


@dataclass(frozen=True)
class CalibrateOptions:
    """What decides the statistics. `dataset` None: pydoc for the demo, else wikitext2.

    `attention_unit` None: what suits the model, single query heads where `prefers_query_heads` and its layers allow it.
    """

    dataset: str | None = None
    nsamples: int = 1024
    seqlen: int = 128
    seed: int = 0
    dtype: Dtype = "auto"
    gram: bool = False
    text_column: str = "text"
    gram_dtype: Literal["float32", "bfloat16"] = "float32"
    fisher: bool = False
    attention_unit: AttentionUnit | None = None
    prefers_query_heads: bool = False


@dataclass(frozen=True)
class PlanOptions:
    """What decides the plan. None leaves it to the method; a `target` decides the ratio in its place."""

    method: Method = "flap"
    metric: Metric | None = None
    structure: Structure | None = None
    ratio: float = 0.2
    remove_heads: int | None = None
    round_to: int = 1
    heads_multiple_of: int = 1
    allow_empty: bool = False
    attention_exponent: float | None = None
    target: "Target | None" = None
    attention_unit: AttentionUnit | None = None
    tensor_parallel: int = 1


@dataclass(frozen=True)
class ApplyOptions:
    """How a plan is applied; None leaves the choice to the plan: its method, its target's dtype, else the source's."""

    compensate: Compensate | None = None
    ridge: float | None = None
    lstsq_bias: bool = True
    mask_only: bool = False
    remote_code: Literal["auto", "always"] = "auto"
    dtype: StoredDtype | None = None
    max_shard_size: str = "5GB"
    sequential: bool = False
    sequential_by_preset: bool = False  # so that a family whose layers it can't fit goes without

    def check(self) -> None:
        """Raise UsageError for options that don't go together."""
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise UsageError(f"--ridge {self.ridge}: must be a number of at least 0")
        own = {"--sequential": self.sequential, "--ridge": self.ridge is not None, "--no-bias": not self.lstsq_bias}
        only_with("--compensate lstsq", self.compensate == "lstsq", own)
        self.shard_size  # noqa: B018  refuses what is no size

    @property
    def shard_size(self) -> int:
        """Bytes of a file of weights at most."""
        return parse_size(self.max_shard_size, "--max-shard-size")


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed: every batch size with every prompt length, `rounds` times after one that does not count.

    None as `threads`: torch's own choice.
    """

    batch_sizes: tuple[int, ...] = (1,)
    prompt_lengths: tuple[int, ...] = (128,)
    new_tokens: int = 16
    rounds: int = 5
    threads: int | None = None

    @property
    def cases(self) -> list[tuple[int, int]]:
        """(batch size, prompt length) in the order they are timed."""
        return [(batch, length) for batch in self.batch_sizes for length in self.prompt_lengths]


@dataclass(frozen=True)
class EvalOptions:
    """What is measured. No `perplexity`: on the calibration's text, of whose windows at most `perplexity_windows`."""

    perplexity: tuple[str, ...] = ()
    seqlen: int = 128
    dtype: Dtype = "auto"
    baseline: bool = True
    text_column: str = "text"
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    speed: SpeedOptions | None = None
    perplexity_windows: int | None = 256
    divergence: bool = False

    def check(self) -> None:
        """Raise UsageError for what no model could be measured by, and for options that do nothing."""
        if self.seqlen < 2:
            raise UsageError("--seqlen must be at least 2")
        if self.divergence and not self.baseline:
            raise UsageError("--divergence is from the dense model, which --no-baseline leaves out: give one of them")
        own = ("limit", "num_fewshot", "include_path")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) is not None for name in own}
        only_with("--tasks", bool(self.tasks), given)

    def recorded(self) -> dict[str, Any]:
        """As artifacts keep it: where no divergence is asked for, as they were before there was one."""
        return {name: value for name, value in asdict(self).items() if value or name != "divergence"}


@dataclass(frozen=True)
class HealOptions:
    """What decides how a pruned model is trained. `dataset` None: the calibration's text and the dense model's own.

    `tokens` None: 1M, or as many as `minutes` hold. `lr` None: by whether `full`, all weights of the decoder layers,
    or adapters of `rank` are trained. `online` needs no `top_k`: nothing of the teacher's is left out.
    """

    dataset: str | None = None
    tokens: int | None = None
    minutes: float | None = None
    seqlen: int = 128
    seed: int = 0
    dtype: Dtype = "auto"
    text_column: str = "text"
    loss: Loss = "kl"
    hidden_layers: tuple[int, ...] = ()
    top_k: int = 64
    online: bool = False
    rank: int = 16
    full: bool = False
    lr: float | None = None
    step_windows: int = 16

    def check(self) -> None:
        """Raise UsageError for options that don't go together, and for what nothing can be trained by."""
        if self.tokens is not None and self.minutes is not None:
            raise UsageError("--tokens and --minutes both say how long to train: give one of them")
        if self.dtype == "float16":
            raise UsageError("--dtype float16: gradients vanish in it: give bfloat16, float32 or auto")
        if self.seqlen < 2:
            raise UsageError("--seqlen must be at least 2")
        counts = {"--tokens": self.tokens, "--minutes": self.minutes, "--lr": self.lr, "--top-k": self.top_k,
                  "--lora-rank": self.rank, "--windows-per-step": self.step_windows}  # fmt: skip
        for option, value in counts.items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{option} {value}: must be more than 0")
        if min(self.hidden_layers, default=0) < 0:
            raise UsageError("--hidden-layers: layers are counted from 0")


@dataclass(frozen=True)
class GenerateOptions:
    """How models go on from a prompt: greedily, or with `sample` drawn at `temperature` from `seed`.

    `chat` puts the prompt into their chat template.
    """

    max_new_tokens: int = 64
    sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    chat: bool = False
    dtype: Dtype = "auto"
    baseline: bool = True
