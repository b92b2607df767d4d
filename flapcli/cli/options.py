"""The command line's options: each defined once, in groups that commands share.

A group is a dataclass whose fields are options with their defaults; `command.ungrouped` puts a group's fields into the
place of a parameter of its type, and `resolve.resolve` makes the stages' own options of them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from flapcli import __version__
from flapcli.cli.help import COMMON, RARE
from flapcli.execution import settings as s
from flapcli.storage.dtypes import Dtype, StoredDtype

PresetName = Literal["paper", "best"]
_common, _rare, _in_text, _in_calibration, _in_plan, _in_apply, _in_eval, _in_execution, _in_speed = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in (COMMON, RARE, "Text", "Calibration", "Plan", "Apply", "Evaluation", "Execution", "Speed")
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"flap {__version__}")
        raise typer.Exit


# One option a line or two, so that the whole list can be read; the formatter would take five for each.
# fmt: off
Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]
Debug = Annotated[bool, _rare("--debug", help="Show tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Work anew even where the artifact is up to date.")]
Run = Annotated[Path, _common("--run-dir", "-d", help="Folder of this pruning run.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write this stage's artifact.")]
StatsFile = Annotated[Path | None, typer.Option("--stats", help="Statistics to read.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan to read.")]
Plot = Annotated[Path | None, typer.Option(help="Draw what the plan keeps into this .png or .svg file.")]
_preset = partial(
    _common,
    help="What options left out mean. paper: FLAP as published. best: Fisher information, least squares without "
    "biases, single query heads, and beside the calibration windows as many that the model writes.")
Preset = Annotated[PresetName, _preset()]
PresetOfRun = Annotated[PresetName | None, _preset(show_default="best; paper for baselines")]
Model = Annotated[str, typer.Argument(
    metavar="[MODEL]", help="Hub id, checkpoint folder, .gguf file, or `demo` (SmolLM2-135M-Instruct).")]
DenseModel = Annotated[str | None, typer.Option("--model", help="The dense model, if it lies elsewhere by now.")]
Checkpoint = partial(typer.Argument, metavar="[CHECKPOINT]", show_default="DIR/pruned")
CheckpointOption = Annotated[str | None, typer.Option(
    "--checkpoint", help="Pruned folder.", show_default="DIR/pruned")]
CompareRuns = Annotated[list[Path] | None, typer.Option(
    "--compare", help="Another run folder to put beside this one; repeatable.")]
AttentionUnit = Annotated[s.AttentionUnit | None, typer.Option(
    "--attention-unit", rich_help_panel="Plan", help="What goes at once of attention whose heads share keys: a KV "
    "group with its query heads, or one query head of every group, whose keys stay.",
    show_default="kv_group; query_head where all heads share one, or by --preset best")]
CheckModel = Annotated[str | None, typer.Option(
    "--check", metavar="MODEL", help="Try the description of this model's family on it.")]
Outtype = Annotated[Literal["f32", "f16", "bf16", "q8_0"], typer.Option(
    help="Type of the weights; llama-quantize makes the smaller ones from f16 or f32.")]


@dataclass(frozen=True)
class HubGroup:
    """How the hub is asked."""

    revision: Annotated[str | None, _rare(help="Branch, tag or commit on the hub.")] = None
    cache_dir: Annotated[Path | None, _rare(help="Where downloads from the hub are kept.")] = None
    trust_remote_code: Annotated[bool, _rare(
        "--trust-remote-code", help="Run code that lies in the checkpoint.")] = False


@dataclass(frozen=True)
class WindowGroup:
    """How any text is read."""

    text_column: Annotated[str, _rare(help="Column of a .jsonl or .parquet file that holds the text.")] = "text"
    seqlen: Annotated[int, _in_text(min=2, help="Tokens in a window.")] = s.CalibrateOptions.seqlen


@dataclass(frozen=True)
class CalibrationGroup:
    """What calibration reads and keeps."""

    dataset: Annotated[list[str] | None, _common(
        help="Calibration text: wikitext2, ptb, c4, pydoc, a .txt, .jsonl or .parquet file, or self (which the model "
        "writes itself); repeatable, with shares as in pydoc:0.7.", show_default="wikitext2; pydoc for demo")] = None
    nsamples: Annotated[int | None, _common(
        min=1, help="Calibration windows.", show_default="1024; 128 by --preset best")] = None
    seed: Annotated[int, _in_text(help="Seed of the windows' places, and of what self samples.")] = 0
    dtype: Annotated[Dtype, _in_calibration(
        "--dtype", help="What the model runs in; auto: bfloat16 where the hardware has it.")] = "auto"
    gram: Annotated[bool, _in_calibration(
        "--gram/--no-gram", help="Keep Gram matrices too (channels squared of each module).")] = False
    gram_dtype: Annotated[Literal["float32", "bfloat16"], _rare(
        "--gram-dtype", help="Type of the Gram matrices on disk.")] = s.CalibrateOptions.gram_dtype
    fisher: Annotated[bool, _in_calibration(
        "--fisher/--no-fisher", help="Keep units' Fisher information too (a backward pass; for plan's --metric FISHER, "
        "and with --gram FISHER-OBS).")] = False


@dataclass(frozen=True)
class UnitGroup:
    """Which units are removed."""

    method: Annotated[s.Method, _in_plan(
        help="flap; or a baseline: wanda-sp (scored here on the dense model's activations, where the authors feed each "
        "layer the pruned output of the ones before), mag-sp (weights only), depth (whole layers, those of least block "
        "influence), experts (whole ones, those of least saliency, as REAP has it).")] = s.PlanOptions.method
    metric: Annotated[s.Metric | None, _in_plan(
        help="Score of a channel, or of a unit by what the loss feels of it: FISHER (needs `calibrate --fisher`), or "
        "FISHER-OBS: of a head once those that stay stand in for it (needs `calibrate --gram --fisher`).",
        show_default="WIFV; FISHER-OBS by --preset best")] = None
    structure: Annotated[s.Structure | None, _in_plan(
        help="UL: same in every layer, AL: adaptive over layers; UM: the ratio in both modules, MM: heads by "
        "--remove-heads, AM: adaptive over modules.", show_default="AL-AM")] = None
    remove_heads: Annotated[int | None, _in_plan(
        min=0, help="For -MM: heads (KV groups under GQA) to remove from the whole model.")] = None
    round_to: Annotated[int, _in_plan(
        min=1, help="Keep MLP widths in multiples of this: 256 suits llama.cpp's K-quants, 32 its older types, 64 "
        "bitsandbytes' 4 bits.")] = s.PlanOptions.round_to
    heads_multiple_of: Annotated[int, _in_plan(
        "--heads-multiple-of", min=1, help="Keep heads or KV groups in multiples of this.")] = 1
    tensor_parallel: Annotated[int, _in_plan(
        "--tensor-parallel", min=1, help="Keep in every layer what splits over so many devices, as vLLM's "
        "--tensor-parallel-size wants it: heads, and MLP widths in multiples of 16 on each.")] = 1
    allow_empty: Annotated[bool, _rare("--allow-empty", help="Let a layer lose all its heads or neurons.")] = False
    attention_exponent: Annotated[float | None, _rare(
        "--attention-exponent", min=0.01, help="Exponent of attention scores.",
        show_default="2 for flap, 1 for baselines")] = None


@dataclass(frozen=True)
class AmountGroup:
    """How much is removed."""

    ratio: Annotated[float | None, _common(
        help="Share of the prunable weights to remove.", show_default=str(s.PlanOptions.ratio))] = None
    target_params: Annotated[str | None, _in_plan(
        help="Instead of --ratio: parameters that the whole model has at most, such as 100M, 1.5B or 75% of what it "
        "has, the biases that apply adds included.")] = None
    target_size: Annotated[str | None, _in_plan(
        help="Instead of --ratio: bytes of weights that apply writes at most, such as 250MB, 1GiB or 50% of the "
        "dense model's in the same type: the source's (float32 for GGUF) where none is given.")] = None


TargetDtype = Annotated[StoredDtype | None, _in_plan(
    "--dtype", help="For --target-size: type that the weights are counted in; apply follows it.")]
TargetBiases = Annotated[bool | None, _in_plan(
    "--target-biases/--no-target-biases", help="For targets: count the biases that compensation adds.",
    show_default="as apply adds them by default: for flap, not for baselines or --preset best")]
Ratios = Annotated[str, _in_plan(help="Shares of the prunable weights to remove, separated by commas.")]

Methods = Annotated[str | None, _in_plan(
    help="Methods to compare at every ratio, separated by commas, in place of --method; baselines as published.")]


@dataclass(frozen=True)
class CompensationGroup:
    """How pruned channels are made up for, and how weights are written."""

    compensate: Annotated[s.Compensate | None, _in_apply(
        help="What makes up for pruned channels: none, bias (the paper's), lstsq (least squares; needs `calibrate "
        "--gram`).", show_default="bias for flap, none for baselines")] = None
    ridge: Annotated[float | None, _in_apply(
        help="For lstsq: ridge, as a share of the kept channels' mean variance.",
        show_default="0.01; 0.3 with --sequential, where it holds every fit near the one without")] = None
    bias: Annotated[bool | None, _in_apply(
        "--bias/--no-bias", help="For lstsq: with biases, or without any.",
        show_default="with; without by --preset best")] = None
    sequential: Annotated[bool | None, _in_apply(
        "--sequential/--no-sequential", help="For lstsq: fit every projection in turn on what the pruned layers before "
        "it make of the calibration text, so that it repairs their errors too; runs the model, one layer at a time.",
        show_default="not; by --preset best yes")] = None
    remote_code: Annotated[Literal["auto", "always"], _rare(
        help="auto: where every layer keeps the same sizes, write a checkpoint that needs no remote code.")] = "auto"
    max_shard_size: Annotated[str, _rare(
        help="Largest weight file, such as 5GB or 500MB.")] = s.ApplyOptions.max_shard_size


MaskOnly = Annotated[bool, _in_apply(
    "--mask-only", help="Zeros in place, shapes unchanged, but for one module where the family has no place for added "
    "biases.")]
Keep = Annotated[bool, _in_apply(
    "--keep/--no-keep", help="Keep every pruned folder; otherwise each goes once it is measured.")]
StoreDtypeOfRun = Annotated[StoredDtype | None, _in_apply(
    "--store-dtype", help="Type of the written weights.", show_default="the source's")]
StoreDtype = Annotated[StoredDtype | None, _in_apply(
    "--dtype", help="Type of the written weights.",
    show_default="what the plan's --target-size was counted in, else the source's")]


@dataclass(frozen=True)
class EvaluationGroup:
    """What is measured."""

    perplexity: Annotated[list[str] | None, _common(
        help="Text to read perplexity on: wikitext2, ptb, c4, pydoc or a .txt, .jsonl or .parquet file; repeatable.",
        show_default="the calibration text's test part")] = None
    perplexity_windows: Annotated[str, _in_eval(
        metavar="N", help="Windows of a text to read at most, evenly spread over it, or all (the paper's).",
        )] = str(s.EvalOptions.perplexity_windows)
    tasks: Annotated[str | None, _in_eval(
        help="lm-eval tasks, separated by commas, or zero-shot for the paper's seven (BoolQ, PIQA, HellaSwag, "
        "WinoGrande, ARC-e, ARC-c, OBQA).")] = None
    include_path: Annotated[Path | None, _rare(help="Folder of your own lm-eval task files.")] = None
    limit: Annotated[float | None, _in_eval(
        min=0.0001, help="Documents of a task, or below 1 a share of them; for trials.")] = None
    baseline: Annotated[bool, _in_eval("--baseline/--no-baseline", help="Measure the dense model beside it.")] = True


EvaluateInRun = Annotated[bool, _in_eval("--eval/--no-eval", help="Measure what came out, or stop at apply.")]
NumFewshot = Annotated[int | None, _in_eval(
    min=0, help="Examples in the prompt.", show_default="the task's own or 0")]
CacheRequests = Annotated[bool, _rare(
    "--cache-requests", help="Keep tasks' built prompts in ~/.cache/flap; --force builds them anew.")]
EvalDtypeOfRun = Annotated[Dtype, _in_eval("--eval-dtype", help="What perplexity runs in; auto as --dtype.")]
EvalDtype = Annotated[Dtype, _in_eval(
    "--dtype", help="What the models run in; auto: bfloat16 where the hardware has it.")]
Divergence = Annotated[bool, _in_eval(
    "--divergence", help="Beside perplexity, on the same windows: how far next-token distributions are from the dense "
    "model's (Kullback-Leibler divergence, dense from pruned), and how many likeliest next tokens are the same.")]
Speed = Annotated[bool, _in_eval("--speed/--no-speed", help="Time both models in turns; measure their memory.")]


@dataclass(frozen=True)
class SpeedGroup:
    """What is timed."""

    speed_batch_sizes: Annotated[str, _in_speed(help="Batch sizes to time, separated by commas.")] = "1"
    speed_lengths: Annotated[str, _in_speed(help="Prompt lengths to time, in tokens, separated by commas.")] = "128"
    speed_new_tokens: Annotated[int, _in_speed(
        min=1, help="Tokens to decode after each prompt.")] = s.SpeedOptions.new_tokens
    speed_rounds: Annotated[int, _in_speed(
        min=1, help="Timed rounds, after one that warms up.")] = s.SpeedOptions.rounds


Device = Annotated[str, _in_execution(help="auto, cpu, cuda, cuda:N or mps.")]
Threads = Annotated[int | None, _in_execution(min=1, help="CPU threads of torch.", show_default="its own choice")]
Stream = Annotated[bool | None, _in_execution(
    "--stream/--no-stream", help="One decoder layer in memory at a time, or the whole model.",
    show_default="--stream where the weights exceed the device's free memory")]


@dataclass(frozen=True)
class ExecutionGroup:
    """Where and in what portions models run."""

    batch_size: Annotated[str, _in_execution(
        help="Windows in a batch; auto: about 1024 tokens on a CPU, more on a GPU.")] = "auto"
    device: Device = s.Execution.device


DeviceMap = Annotated[Literal["auto", "balanced", "sequential"] | None, _rare(
    help="Spread the model over all GPUs of this machine, by accelerate.")]
RankTimeout = Annotated[float, _rare(
    min=5, help="Under torchrun: seconds without a sign of life after which a rank counts as dead.")]


@dataclass(frozen=True)
class ScaleGroup:
    """How a calibration copes with size."""

    activation_memory: Annotated[str, _rare(
        help="Hidden states of all windows stay in memory up to this size, else in files (--stream).",
        )] = s.Execution.activation_memory
    device_map: DeviceMap = None
    rank_timeout: RankTimeout = s.Execution.rank_timeout


@dataclass(frozen=True)
class GenerateGroup:
    """How models go on from a prompt."""

    max_new_tokens: Annotated[int, typer.Option(
        min=1, help="Tokens to generate at most.")] = s.GenerateOptions.max_new_tokens
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False
    seed: Annotated[int, typer.Option("--seed", help="Seed of --sample.")] = s.GenerateOptions.seed
    temperature: Annotated[float | None, typer.Option(min=0.01, max=1000, help="Of --sample.", show_default="1")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False
    baseline: Annotated[bool, typer.Option(
        "--baseline/--no-baseline", help="Measure the dense model beside it.")] = True
# fmt: on
