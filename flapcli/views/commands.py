"""The commands that make a run anew, as a user would type them, from what its artifacts record. No torch."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.stats import StatsHeader
from flapcli.artifacts.sweep_results import Sweep
from flapcli.artifacts.target import Target
from flapcli.execution.settings import RIDGES, ApplyOptions, CalibrateOptions, EvalOptions, PlanOptions, SpeedOptions
from flapcli.planning.methods import DEFAULT_METRIC, DEFAULT_STRUCTURE
from flapcli.texts.corpus import default_text
from flapcli.texts.mixture import SELF, Mixture

APPLY = ("compensate", "ridge", "lstsq_bias", "sequential", "mask_only", "remote_code", "dtype", "max_shard_size")
WIDTH = 76  # columns, past which a command goes on in the next line
IN_RUN = {"apply": {"dtype": "store_dtype"}, "eval": {"dtype": "eval_dtype"}}  # what `flap run` calls a stage's option
NOT_IN_RUN = {"num_fewshot", "threads", "speed_batch_sizes", "speed_lengths", "speed_new_tokens", "speed_rounds"}


class Preset(Protocol):
    """What --preset best stands for, as the command line knows it."""

    @property
    def metric(self) -> str | None: ...
    @property
    def structure(self) -> str | None: ...
    @property
    def compensate(self) -> str | None: ...
    @property
    def bias(self) -> bool: ...
    @property
    def sequential(self) -> bool: ...
    @property
    def nsamples(self) -> int: ...
    def text(self, named: Sequence[str] | None, default: str, nsamples: int | None = None) -> tuple[str, int]: ...


@dataclass(frozen=True)
class Asked:
    """A stage's options where they are not their defaults; `best` where --preset best says the rest."""

    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    best: bool = False

    @classmethod
    def of(cls, stage: str, options: Mapping[str, Any], defaults: Mapping[str, Any], best: bool = False) -> "Asked":
        left = {key: value for key, value in options.items() if value != defaults.get(key)}
        return cls(stage, left, best)

    def line(self, arguments: Sequence[str], run_dir: str) -> str:
        preset = {"preset": "best"} if self.best else {}
        return _join(self.stage, arguments, run_dir, preset | self.options)


def calibrate_asked(header: StatsHeader, best: Preset) -> Asked:
    defaults = asdict(CalibrateOptions())
    options: dict[str, Any] = {key: value for key, value in header.settings.items() if key in defaults}
    options |= {"revision": header.model.revision, "attention_unit": header.model.attention_unit}
    mixture, default = Mixture.read(header.calibration.dataset), default_text(header.model.name)
    counts = dict(zip(mixture.sources, mixture.counts(header.calibration.nsamples), strict=True))
    texts = [source for source in mixture.sources if source != SELF]
    named, is_best = mixture.named, False
    if len(texts) == 1 and options.get("gram") and options.get("fisher"):
        made, total = best.text(texts, default, counts[texts[0]])
        if is_best := (Mixture.read(made) == mixture and total == header.calibration.nsamples):
            named = texts
            options |= {"nsamples": counts[texts[0]], "gram": False, "fisher": False}
            defaults["nsamples"] = best.nsamples
            if header.model.parts_groups:  # into query heads, by the preset alone
                options["attention_unit"] = None if options["attention_unit"] else "kv_group"
    options["dataset"] = None if named == [default] else named
    return Asked.of("calibrate", options, defaults, is_best)


def plan_asked(plan: Plan, best: Preset) -> Asked:
    chosen = {"method": plan.method, "metric": plan.metric, "structure": plan.structure, **plan.settings}
    chosen.pop("elimination_weight", None)  # of the metric's formula, and no option
    return _units_asked(chosen | {"ratio": None if plan.target else plan.ratio.requested}, plan.target, best)


def _units_asked(chosen: Mapping[str, Any], target: Target | None, best: Preset) -> Asked:
    """Baselines fix metric and structure themselves, so only flap's are spelled out."""
    flap, options = chosen["method"] == "flap", dict(chosen)
    is_best = flap and (chosen["metric"], chosen["structure"]) == (best.metric, best.structure)
    if not flap or is_best:
        options |= {"metric": None, "structure": None}
    if target and not target.biases:
        options |= {"target_biases": None, "no_target_biases": None if is_best or not flap else True}
    elif target and flap and not is_best:
        options["target_biases"] = None
    defaults = asdict(PlanOptions()) | {"metric": DEFAULT_METRIC, "structure": DEFAULT_STRUCTURE}
    return Asked.of("plan", options, defaults | {"attention_exponent": 2.0 if flap else 1.0}, is_best)


def apply_asked(made_by: Mapping[str, Any], plan: Plan | None, best: Preset) -> Asked:
    options = {key: made_by.get(key) for key in APPLY if key != "lstsq_bias"}
    sequential, bias = bool(made_by.get("sequential")), made_by.get("lstsq_bias") is not False
    is_best = (options["compensate"], bias, sequential) == (best.compensate, best.bias, best.sequential)
    if options["compensate"] != "lstsq":
        options["ridge"] = None
    elif is_best:
        options |= {"compensate": None, "sequential": False}
    else:
        options["no_bias"] = not bias
    defaults = asdict(ApplyOptions()) | {"ridge": RIDGES[sequential]}
    if plan:
        defaults |= {"compensate": "bias" if plan.method == "flap" else "none"}
        defaults |= {"dtype": plan.target.dtype if plan.target else None}
    return Asked.of("apply", options, defaults, is_best)


def heal_asked(healed: Healed) -> Asked:
    """Of adapters or all weights only those options that act."""
    asked = healed.settings
    column = asked.get("text_column")
    options: dict[str, Any] = {
        "dataset": Mixture.read(healed.dataset).named,
        "text_column": None if column == "text" else column,
        "hidden_layers": ",".join(map(str, asked["hidden_layers"])) or None,
        "lora_rank": None if asked["full"] else asked["rank"],
        "top_k": None if asked["online"] else asked["top_k"],
        "windows_per_step": asked["step_windows"],
    }
    plain = ("tokens", "minutes", "seqlen", "seed", "dtype", "loss", "online", "full", "lr")
    return Asked("heal", options | {key: asked[key] for key in plain})


def eval_asked(settings: Mapping[str, Any], header: StatsHeader | None) -> Asked:
    keys = ("perplexity", "include_path", "limit", "num_fewshot", "seqlen", "dtype", "text_column", "divergence")
    options: dict[str, Any] = {key: settings.get(key) for key in keys}
    options |= {
        "tasks": ",".join(settings.get("tasks") or []) or None,
        "perplexity_windows": settings.get("perplexity_windows", EvalOptions.perplexity_windows) or "all",
        "no_baseline": not settings.get("baseline"),
    }
    if header and options["perplexity"] == [Mixture.read(header.calibration.dataset).sources[0]]:
        options["perplexity"] = None
    if speed := settings.get("speed"):
        usual = SpeedOptions()
        given = {
            "speed_batch_sizes": (speed["batch_sizes"], usual.batch_sizes),
            "speed_lengths": (speed["prompt_lengths"], usual.prompt_lengths),
        }
        options |= {"speed": True, "threads": speed["threads"]}
        options |= {key: ",".join(map(str, made)) for key, (made, default) in given.items() if tuple(made) != default}
        options |= {f"speed_{key}": speed[key] for key in ("new_tokens", "rounds") if speed[key] != getattr(usual, key)}
    return Asked.of("eval", options, asdict(EvalOptions()))


def made_anew(
    header: StatsHeader | None,
    plan: Plan | None,
    made_by: Mapping[str, Any] | None,
    evaluated: Mapping[str, Any] | None,
    run_dir: str,
    best: Preset,
    healed: Healed | None = None,
    measured: str | None = None,
) -> list[str]:
    """One `flap run` where that says it all, else a line for each stage that left something.

    `measured` is the checkpoint that was evaluated, where it is not the run's pruned one.
    """
    model = [header.model.name] if header else []
    stages = [
        calibrate_asked(header, best) if header else None,
        plan_asked(plan, best) if plan else None,
        apply_asked(made_by, plan, best) if made_by else None,
        eval_asked(evaluated, header) if evaluated else None,
    ]
    there = [stage for stage in stages if stage]
    whole = _as_run(there) if len(there) == len(stages) and not healed else None
    if whole:
        paper = {} if whole.best or "method" in whole.options else {"preset": "paper"}  # a baseline's anyway
        return [Asked("run", paper | whole.options).line(model, run_dir)]
    if healed:
        there.insert(3 if len(there) == len(stages) else len(there), heal_asked(healed))
    arguments = {"calibrate": model, "eval": [measured] if measured else []}
    return [stage.line(arguments.get(stage.stage, []), run_dir) for stage in there]


def sweep_anew(header: StatsHeader | None, sweep: Sweep, run_dir: str, best: Preset) -> list[str]:
    """The `flap sweep` that made a sweep, once its statistics say of what; its texts are those that it tells."""
    if header is None or "heal" in sweep.settings:  # whose options are too many to tell here
        return []
    ratios = ",".join(f"{ratio:g}" for ratio in sweep.settings["ratios"])
    plan = _units_asked(sweep.settings["plan"], None, best)
    evaluated = eval_asked(sweep.settings["eval"] | {"baseline": sweep.dense is not None}, header)
    stages = [calibrate_asked(header, best), plan, apply_asked(sweep.settings["apply"], None, best), evaluated]
    line = _as_run(stages)
    if line is None:
        return []
    methods = ",".join(sweep.settings.get("methods", ())) or None
    options = {"methods": methods, "ratios": None if ratios == "0.1,0.2,0.3,0.5" else ratios} | line.options
    return [Asked("sweep", options, line.best).line([header.model.name], run_dir)]


def _as_run(stages: Sequence[Asked]) -> Asked | None:
    """The four stages as options of one command for all; None where that has no words for them."""
    calibrate, plan, apply, evaluate = stages
    shared = ("seqlen", "text_column")
    told = {key for stage in stages for key in stage.options}
    if len({stage.best for stage in (calibrate, plan, apply)}) > 1 or told & NOT_IN_RUN:
        return None
    if any(calibrate.options.get(key) != evaluate.options.get(key) for key in shared) or plan.options.keys() & {
        "dtype", "target_biases", "no_target_biases"
    }:  # fmt: skip
        return None
    found: dict[str, Any] = {}
    for stage in stages:
        found |= {IN_RUN.get(stage.stage, {}).get(key, key): value for key, value in stage.options.items()}
    return Asked("run", found, calibrate.best)


def next_commands(run_dir: str, healed: str | None, exports: bool, measured: bool) -> list[str]:
    """What to do with a run that is done; `healed` is the folder of a healed model, which is then the one of use."""
    place = shlex.quote(run_dir)
    of_run, named = f"-d {place}", f"-d {place}"
    if healed:
        of_run, named = f"{of_run} --checkpoint {shlex.quote(healed)}", f"{shlex.quote(healed)} {named}"
    onward = f"flap export gguf {named}" if exports else f"flap push USER/NAME {named}"
    return [f'flap generate "Once upon a time" {of_run}', f"flap {'report' if measured else 'eval'} -d {place}", onward]


def _join(command: str, arguments: Sequence[str], run_dir: str, options: Mapping[str, Any]) -> str:
    """A command for a shell, broken where long: flags where True, lists as repeated options, no None or False."""
    parts = [shlex.join(["flap", command, *arguments, "-d", run_dir])]
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if value is True:
            parts.append(name)
        elif isinstance(value, list | tuple):
            parts += [shlex.join([name, str(item)]) for item in value]
        elif value is not None and value is not False:
            parts.append(shlex.join([name, str(value)]))
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < WIDTH:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)
