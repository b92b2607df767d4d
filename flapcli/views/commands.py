"""The commands that make a run anew, from what its artifacts record. No torch."""

import shlex
from collections.abc import Mapping
from typing import Any

from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.stats import StatsHeader
from flapcli.texts.mixture import Mixture

LSTSQ = ("ridge", "lstsq_bias")
APPLY = ("compensate", *LSTSQ, "sequential", "mask_only", "remote_code", "dtype", "max_shard_size")


def calibrate_command(header: StatsHeader, run_dir: str) -> str:
    options: dict[str, Any] = header.settings | {
        "dataset": Mixture.read(header.calibration.dataset).named,
        "text_column": _column(header.settings),
        "revision": header.model.revision,
    }
    return _join("calibrate", [header.model.name], run_dir, options)


def plan_command(plan: Plan, run_dir: str) -> str:
    """Baselines fix metric and structure themselves, so only flap's are spelled out."""
    target = plan.target
    options: dict[str, Any] = {"method": plan.method, "ratio": None if target else plan.ratio.requested}
    if plan.method == "flap":
        options |= {"metric": plan.metric, "structure": plan.structure}
    options |= plan.settings | {"no_target_biases": bool(target and not target.biases)}
    return _join("plan", [], run_dir, options)


def apply_command(made_by: Mapping[str, Any], run_dir: str) -> str:
    options = {key: made_by.get(key) for key in APPLY if key not in LSTSQ}
    if made_by.get("compensate") == "lstsq":
        options |= {"ridge": made_by.get("ridge"), "no_bias": made_by.get("lstsq_bias") is False}
    return _join("apply", [], run_dir, options)


def heal_command(healed: Healed, run_dir: str) -> str:
    """Of adapters or all weights only those options that act."""
    asked = healed.settings
    options: dict[str, Any] = {
        "dataset": Mixture.read(healed.dataset).named,
        "text_column": _column(asked),
        "hidden_layers": ",".join(map(str, asked["hidden_layers"])) or None,
        "lora_rank": None if asked["full"] else asked["rank"],
        "top_k": None if asked["online"] else asked["top_k"],
        "windows_per_step": asked["step_windows"],
    }
    plain = ("tokens", "minutes", "seqlen", "seed", "dtype", "loss", "online", "full", "lr")
    return _join("heal", [], run_dir, options | {key: asked[key] for key in plain})


def eval_command(settings: Mapping[str, Any], run_dir: str, checkpoint: str | None = None) -> str:
    options: dict[str, Any] = {
        "perplexity": settings.get("perplexity", []),
        "tasks": ",".join(settings.get("tasks") or []) or None,
        **{key: settings.get(key) for key in ("include_path", "limit", "num_fewshot", "seqlen", "dtype")},
        "text_column": _column(settings),
        "no_baseline": settings.get("baseline") is None,
    }
    if speed := settings.get("speed"):
        options |= {
            "speed": True,
            "speed_batch_sizes": ",".join(map(str, speed["batch_sizes"])),
            "speed_lengths": ",".join(map(str, speed["prompt_lengths"])),
            "speed_new_tokens": speed["new_tokens"],
            "speed_rounds": speed["rounds"],
            "threads": speed["threads"],
        }
    return _join("eval", [checkpoint] if checkpoint else [], run_dir, options)


def next_commands(run_dir: str, exports: bool, measured: bool) -> list[str]:
    """What to do with a run that is done."""
    place = shlex.quote(run_dir)
    report = f"flap {'report' if measured else 'eval'} -d {place}"
    export = [f"flap export gguf -d {place}"] if exports else [f"flap push USER/NAME -d {place}"]
    return [f'flap generate "Once upon a time" -d {place}', report, *export]


def _column(settings: Mapping[str, Any]) -> str | None:
    """`--text-column` where it is not the default."""
    column = settings.get("text_column")
    return None if column == "text" else column


def _join(command: str, arguments: list[str], run_dir: str, options: Mapping[str, Any]) -> str:
    """One line for a shell: flags where True, repeated options for lists, nothing for None and False."""
    parts = ["flap", command, *arguments, "-d", run_dir]
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if value is True:
            parts.append(name)
        elif isinstance(value, list | tuple):
            parts += [part for item in value for part in (name, str(item))]
        elif value is not None and value is not False:
            parts += [name, str(value)]
    return shlex.join(parts)
