"""From what the command line gives, group by group, to the stages' own options. One function for all commands."""

from dataclasses import dataclass, field

from flapcli.architecture.flap_section import adds_bias
from flapcli.architecture.shape import AttentionUnit
from flapcli.checkpoints import DEMO, Hub
from flapcli.cli import options as o
from flapcli.cli import values
from flapcli.cli.heal_options import HealGroup
from flapcli.cli.presets import preset_of
from flapcli.errors import UsageError, only_with
from flapcli.evaluation.stage import check_options
from flapcli.evaluation.task_names import expand
from flapcli.execution.settings import (
    ApplyOptions,
    CalibrateOptions,
    EvalOptions,
    Execution,
    HealOptions,
    PlanOptions,
    SpeedOptions,
)
from flapcli.healing.stage import check as check_healing
from flapcli.planning.methods import checked, needed
from flapcli.planning.target_search import target_of
from flapcli.storage.dtypes import Dtype, StoredDtype
from flapcli.texts.corpus import default_text
from flapcli.texts.mixture import combined


@dataclass(frozen=True)
class Asked:
    """All that a command may ask of the four stages; what it has no options for stays as by default.

    `lean`: calibrate keeps nothing that these very stages do not read; else what the preset's own stages would.
    """

    model: str = DEMO
    preset: o.PresetName | None = "paper"
    windows: o.WindowGroup = field(default_factory=o.WindowGroup)
    calibration: o.CalibrationGroup = field(default_factory=o.CalibrationGroup)
    units: o.UnitGroup = field(default_factory=o.UnitGroup)
    amount: o.AmountGroup = field(default_factory=o.AmountGroup)
    target_dtype: StoredDtype | None = None
    target_biases: bool | None = None
    compensation: o.CompensationGroup = field(default_factory=o.CompensationGroup)
    mask_only: bool = False
    store_dtype: StoredDtype | None = None
    evaluation: o.EvaluationGroup = field(default_factory=o.EvaluationGroup)
    eval_dtype: Dtype = "auto"
    num_fewshot: int | None = None
    speed: SpeedOptions | None = None
    divergence: bool = False
    lean: bool = False
    attention_unit: AttentionUnit | None = None
    heal_minutes: float | None = None
    heal_tokens: int | None = None


@dataclass(frozen=True)
class Stages:
    """The options of the four stages, and of healing where that is asked for."""

    calibrate: CalibrateOptions
    plan: PlanOptions
    apply: ApplyOptions
    evaluate: EvalOptions
    heal: HealOptions | None = None

    def check(self, execution: Execution) -> None:
        """Raise UsageError for options that don't go together, before anything is calibrated."""
        self.apply.check()
        check_options(self.evaluate, execution)
        checked(self.plan)
        if self.heal:
            check_healing(self.heal)


def resolve(asked: Asked) -> Stages:
    """What each stage does: what is given stands, else what the preset says, else the stage's own default.

    Raises UsageError for options that contradict each other or can't be read.
    """
    chosen = preset_of(asked.preset, asked.units.method)
    given, units, amount = asked.compensation, asked.units, asked.amount
    compensate, bias, sequential = chosen.compensation(given.compensate, given.bias, given.sequential)
    if given.bias and compensate == "none":
        raise UsageError("--bias is for --compensate lstsq, which has them by default; --compensate none adds none")
    metric, structure = units.metric or chosen.metric, units.structure or chosen.structure
    gram, fisher = needed(metric, compensate, asked.calibration.gram, asked.calibration.fisher)
    if not asked.lean:
        gram, fisher = needed(chosen.metric, chosen.compensate, gram, fisher)
    text, nsamples = chosen.text(asked.calibration.dataset, default_text(asked.model), asked.calibration.nsamples)
    windows, calibration, evaluation = asked.windows, asked.calibration, asked.evaluation
    biases = asked.target_biases
    if biases is None and compensate and (amount.target_params or amount.target_size):
        biases = adds_bias(compensate, bias)  # else by the method
    target = target_of(amount.ratio, amount.target_params, amount.target_size, asked.target_dtype, biases, units.method)
    return Stages(
        CalibrateOptions(
            text, nsamples, windows.seqlen, calibration.seed, calibration.dtype, gram, windows.text_column,
            calibration.gram_dtype, fisher, asked.attention_unit, chosen.query_heads,
        ),
        PlanOptions(
            units.method, metric, structure, PlanOptions.ratio if amount.ratio is None else amount.ratio,
            units.remove_heads, units.round_to, units.heads_multiple_of, units.allow_empty, units.attention_exponent,
            target, asked.attention_unit, units.tensor_parallel,
        ),
        ApplyOptions(
            compensate, given.ridge, bias, asked.mask_only, given.remote_code, asked.store_dtype, given.max_shard_size,
            sequential, sequential and given.sequential is None,
        ),
        EvalOptions(
            tuple(evaluation.perplexity or ()), windows.seqlen, asked.eval_dtype, evaluation.baseline,
            windows.text_column, expand(evaluation.tasks) if evaluation.tasks is not None else (),
            str(evaluation.include_path) if evaluation.include_path else None, evaluation.limit, asked.num_fewshot,
            asked.speed, values.windows(evaluation.perplexity_windows, "--perplexity-windows", "all"),
            asked.divergence,
        ),
        HealOptions(
            None, asked.heal_tokens, asked.heal_minutes, windows.seqlen, calibration.seed, calibration.dtype,
            windows.text_column,
        )
        if asked.heal_tokens or asked.heal_minutes
        else None,
    )  # fmt: skip


def execution_of(
    group: o.ExecutionGroup,
    stream: bool | None = None,
    threads: int | None = None,
    cache_requests: bool = False,
    scale: o.ScaleGroup = o.ScaleGroup(),
) -> Execution:
    """How models run. Raises UsageError for a --batch-size that is none."""
    return Execution(
        group.device, values.windows(group.batch_size, "--batch-size", "auto"), threads, stream,
        scale.activation_memory, scale.device_map, scale.rank_timeout, cache_requests,
    )  # fmt: skip


def healing_of(group: HealGroup, windows: o.WindowGroup) -> HealOptions:
    """What `flap heal` is asked for. Raises UsageError for what can't be read."""
    layers = values.numbers(group.hidden_layers, "--hidden-layers", least=0) if group.hidden_layers else ()
    return HealOptions(
        combined(group.dataset) if group.dataset else None, group.tokens, group.minutes, windows.seqlen, group.seed,
        group.dtype, windows.text_column, group.loss, layers, group.top_k, group.online, group.lora_rank, group.full,
        group.lr, group.windows_per_step,
    )  # fmt: skip


def healing_execution_of(group: HealGroup, execution: o.ExecutionGroup) -> Execution:
    batch_size = values.windows(execution.batch_size, "--batch-size", "auto")
    return Execution(
        execution.device, batch_size, device_map=group.device_map, rank_timeout=group.rank_timeout,
        checkpoint_activations=group.checkpoint_activations,
    )  # fmt: skip


def hub_of(group: o.HubGroup) -> Hub:
    return Hub(group.revision, group.cache_dir, group.trust_remote_code)


def speed_of(speed: bool, group: o.SpeedGroup, threads: int | None) -> SpeedOptions | None:
    """What is timed, None where nothing is. Raises UsageError for options of --speed without it."""
    defaults = vars(o.SpeedGroup())
    given = {f"--{name.replace('_', '-')}": value != defaults[name] for name, value in vars(group).items()}
    only_with("--speed", speed, given)
    sizes = values.numbers(group.speed_batch_sizes, "--speed-batch-sizes")
    lengths = values.numbers(group.speed_lengths, "--speed-lengths")
    return SpeedOptions(sizes, lengths, group.speed_new_tokens, group.speed_rounds, threads) if speed else None
