"""The command line's options, each defined once and used by every command that takes it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flapcli import __version__
from flapcli.errors import UsageError

PresetName = Literal["paper", "best"]
Method = Literal["flap", "wanda-sp", "mag-sp", "depth"]
Metric = Literal["IFV", "WIFV", "WIFN", "FISHER", "FISHER-OBS"]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "bfloat16", "float16"]
Compensate = Literal["none", "bias", "lstsq"]

_debug = False


def debugging() -> bool:
    """Whether --debug was given: tracebacks instead of one line."""
    return _debug


def _set_debug(value: bool) -> bool:
    global _debug  # noqa: PLW0603
    _debug = _debug or value
    return value


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"flap {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Work anew even where the artifact is up to date.")]
Run = Annotated[Path, typer.Option("--run-dir", "-d", help="Folder of this pruning run.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write this stage's artifact.")]
StatsFile = Annotated[Path | None, typer.Option("--stats", help="Statistics to read.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan to read.")]

_MODEL_HELP = "Hub id, checkpoint folder, .gguf file, or `demo` (SmolLM2-135M-Instruct)."
Model = Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)]
DenseModel = Annotated[str | None, typer.Option("--model", help="The dense model, if it lies elsewhere by now.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads from the hub are kept.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies in the checkpoint.")]

Dataset = Annotated[
    list[str] | None,
    typer.Option(help="Calibration text: wikitext2, ptb, c4, pydoc, a .txt, .jsonl or .parquet file, or self (which "
                 "the model writes itself); repeatable, with shares as in pydoc:0.7 [default: wikitext2; pydoc for "
                 "demo]."),
]  # fmt: skip
TextColumn = Annotated[str, typer.Option(help="Column of a .jsonl or .parquet file that holds the text.")]
Nsamples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Seed = Annotated[int, typer.Option(help="Seed of the windows' places, and of what self samples.")]
BatchSize = Annotated[str, typer.Option(help="Windows in a batch; auto: about 1024 tokens on a CPU, more on a GPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
RunDtype = Annotated[
    Dtype, typer.Option("--dtype", help="What the model runs in; auto: bfloat16 where the hardware has it.")
]
EvalDtype = Annotated[Dtype, typer.Option("--eval-dtype", help="What perplexity runs in; auto: float32 on a CPU.")]
Gram = Annotated[
    bool, typer.Option("--gram/--no-gram", help="Keep Gram matrices too (channels squared of each module).")
]
GramDtypeOption = Annotated[
    Literal["float32", "bfloat16"], typer.Option("--gram-dtype", help="Type of the Gram matrices on disk.")
]
Fisher = Annotated[
    bool,
    typer.Option("--fisher/--no-fisher", help="Keep units' Fisher information too (a backward pass; for plan's "
                 "--metric FISHER, and with --gram FISHER-OBS)."),
]  # fmt: skip
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="One decoder layer in memory at a time, or the whole model [default: "
                 "--stream where the weights exceed the device's free memory]."),
]  # fmt: skip
ActivationMemory = Annotated[
    str, typer.Option(help="Hidden states of all windows stay in memory up to this size, else in files (--stream).")
]
DeviceMap = Annotated[
    Literal["auto", "balanced", "sequential"] | None,
    typer.Option(help="Spread the model over all GPUs of this machine, by accelerate."),
]
RankTimeout = Annotated[
    float, typer.Option(min=5, help="Under torchrun: seconds without a sign of life after which a rank counts as dead.")
]

Preset = Annotated[
    PresetName,
    typer.Option(help="What options left out mean. paper: FLAP as published. best: Fisher information, least squares "
                 "without biases, and beside the calibration windows three eighths as many that the model writes."),
]  # fmt: skip
MethodOption = Annotated[
    Method,
    typer.Option(help="flap; or a baseline: wanda-sp (scored here on the dense model's activations, where the "
                 "authors feed each layer the pruned output of the ones before), mag-sp (weights only), depth (whole "
                 "layers, those of least block influence)."),
]  # fmt: skip
MetricOption = Annotated[
    Metric | None,
    typer.Option(help="Score of a channel, or of a unit by what the loss feels of it: FISHER (needs `calibrate "
                 "--fisher`), or FISHER-OBS: of a head once those that stay stand in for it (needs `calibrate "
                 "--gram --fisher`) [default: WIFV; FISHER-OBS by --preset best]."),
]  # fmt: skip
StructureOption = Annotated[
    Structure | None,
    typer.Option(help="UL: same in every layer, AL: adaptive over layers; UM: the ratio in both modules, MM: heads by "
                 "--remove-heads, AM: adaptive over modules [default: AL-AM]."),
]  # fmt: skip
RatioOption = Annotated[
    float | None, typer.Option(help="Share of the prunable weights to remove [default: 0.2].", show_default=False)
]
TargetParams = Annotated[
    str | None,
    typer.Option(help="Instead of --ratio: parameters that the whole model has at most, such as 100M or 1.5B, the "
                 "biases that apply adds included."),
]  # fmt: skip
TargetSize = Annotated[
    str | None,
    typer.Option(help="Instead of --ratio: bytes of weights that apply writes at most, such as 250MB or 1GiB; counted "
                 "in the source's type (float32 for GGUF) where no type is given."),
]  # fmt: skip
Ratios = Annotated[str, typer.Option(help="Shares of the prunable weights to remove, separated by commas.")]
Keep = Annotated[
    bool,
    typer.Option("--keep/--no-keep", help="Keep every pruned folder; otherwise each goes once it is measured."),
]
RemoveHeads = Annotated[
    int | None,
    typer.Option(min=0, help="For -MM: heads (KV groups under GQA) to remove from the whole model."),
]
RoundTo = Annotated[
    int,
    typer.Option(min=1, help="Keep MLP widths in multiples of this: 256 suits llama.cpp's K-quants, 32 its older "
                 "types, 64 bitsandbytes' 4 bits."),
]  # fmt: skip
HeadsMultiple = Annotated[
    int, typer.Option("--heads-multiple-of", min=1, help="Keep heads or KV groups in multiples of this.")
]
AllowEmpty = Annotated[bool, typer.Option("--allow-empty", help="Let a layer lose all its heads or neurons.")]
Exponent = Annotated[
    float | None,
    typer.Option(
        "--attention-exponent",
        min=0.01,
        help="Exponent of attention scores [default: 2 for flap, 1 for baselines].",
    ),
]

CompensateOption = Annotated[
    Compensate | None,
    typer.Option(help="What makes up for pruned channels: none, bias (the paper's), lstsq (least squares; needs "
                 "`calibrate --gram`) [default: bias for flap, none for baselines]."),
]  # fmt: skip
Ridge = Annotated[
    float | None,
    typer.Option(help="For lstsq: ridge, as a share of the kept channels' mean variance [default: 0.01; 0.3 with "
                 "--sequential, where it holds every fit near the one without]."),
]  # fmt: skip
Sequential = Annotated[
    bool | None,
    typer.Option("--sequential/--no-sequential", help="For lstsq: fit every projection in turn on what the pruned "
                 "layers before it make of the calibration text, so that it repairs their errors too; runs the "
                 "model, one layer at a time [default: not; by --preset best yes]."),
]  # fmt: skip
LstsqBias = Annotated[
    bool | None,
    typer.Option("--bias/--no-bias", help="For lstsq: with biases, or without any [default: with; without by "
                 "--preset best]."),
]  # fmt: skip
MaskOnly = Annotated[bool, typer.Option("--mask-only", help="Zeros in place, shapes unchanged.")]
RemoteCode = Annotated[
    Literal["auto", "always"],
    typer.Option(help="auto: where every layer keeps the same sizes, write a checkpoint that needs no remote code."),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MB.")]
StoreDtypeOfRun = Annotated[
    StoredDtype | None, typer.Option("--store-dtype", help="Type of the written weights [default: the source's].")
]
TargetDtype = Annotated[
    StoredDtype | None,
    typer.Option("--dtype", help="For --target-size: type that the weights are counted in; apply follows it."),
]
TargetBiases = Annotated[
    bool | None,
    typer.Option("--target-biases/--no-target-biases", help="For targets: count the biases that compensation adds "
                 "[default: as apply adds them by default: for flap, not for baselines or --preset best]."),
]  # fmt: skip
StoreDtype = Annotated[
    StoredDtype | None,
    typer.Option("--dtype", help="Type of the written weights [default: what the plan's --target-size was counted in, "
                 "else the source's]."),
]  # fmt: skip

Outtype = Annotated[
    Literal["f32", "f16", "bf16", "q8_0"],
    typer.Option(help="Type of the weights; llama-quantize makes the smaller ones from f16 or f32."),
]

Perplexity = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to read perplexity on: wikitext2, ptb, c4, pydoc or a .txt, .jsonl or .parquet file; repeatable "
        "[default: the calibration text's test part]."
    ),
]
Baseline = Annotated[bool, typer.Option("--baseline/--no-baseline", help="Measure the dense model beside it.")]

Tasks = Annotated[
    str | None,
    typer.Option(help="lm-eval tasks, separated by commas, or zero-shot for the paper's seven (BoolQ, PIQA, HellaSwag, "
                 "WinoGrande, ARC-e, ARC-c, OBQA)."),
]  # fmt: skip
IncludePath = Annotated[Path | None, typer.Option(help="Folder of your own lm-eval task files.")]
Limit = Annotated[
    float | None, typer.Option(min=0.0001, help="Documents of a task, or below 1 a share of them; for trials.")
]
NumFewshot = Annotated[int | None, typer.Option(min=0, help="Examples in the prompt [default: the task's own or 0].")]
CacheRequests = Annotated[
    bool, typer.Option("--cache-requests", help="Keep tasks' built prompts in ~/.cache/flap; --force builds them anew.")
]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Time both models in turns; measure their memory.")]
SpeedBatchSizes = Annotated[str, typer.Option(help="Batch sizes to time, separated by commas.")]
SpeedLengths = Annotated[str, typer.Option(help="Prompt lengths to time, in tokens, separated by commas.")]
SpeedNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to decode after each prompt.")]
SpeedRounds = Annotated[int, typer.Option(min=1, help="Timed rounds, after one that warms up.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch [default: its own choice].")]
Plot = Annotated[Path | None, typer.Option(help="Draw what the plan keeps into this .png or .svg file.")]


def batch(text: str) -> int | None:
    """The number of --batch-size; None for auto. Raises UsageError for anything else."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: give a number of windows, at least 1, or auto")
    return int(text)


def ratios(text: str) -> tuple[float, ...]:
    """`0.1,0.2` as (0.1, 0.2), ascending. Raises UsageError for anything but shares of at least 0 and less than 1."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 <= ratio < 1 for ratio in found):
        raise UsageError(f"--ratios {text}: give shares of at least 0 and less than 1, separated by commas")
    return tuple(found)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,8` as (1, 8). Raises UsageError for anything but positive numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text}: give numbers of at least 1, separated by commas")
    return tuple(int(part) for part in parts)


CompareRuns = Annotated[
    list[Path] | None, typer.Option("--compare", help="Another run folder to put beside this one; repeatable.")
]
CheckpointOption = Annotated[str | None, typer.Option("--checkpoint", help="Pruned folder [default: DIR/pruned].")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")]
SampleSeed = Annotated[int, typer.Option("--seed", help="Seed of --sample.")]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Of --sample [default: 1].")]
Chat = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")]
EvalRunDtype = Annotated[Dtype, typer.Option("--dtype", help="What the models run in; auto: float32 on a CPU.")]
