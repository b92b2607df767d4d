"""Settings as the page tells them: in words, without what only the cache reads."""

from collections.abc import Mapping
from typing import Any

from flapcli.architecture.flap_section import Healed
from flapcli.artifacts.eval_report import EvalReport
from flapcli.artifacts.plan import Plan
from flapcli.artifacts.stats import StatsHeader
from flapcli.texts.mixture import Mixture
from flapcli.views.commands import APPLY

# Settings by what they are called here; the others by their own names.
WORDS = {
    "dataset": "text", "seqlen": "tokens in a window", "seed": "seed", "tokens": "tokens in all",
    "dtype": "ran in", "begins_with": "each window begins with", "mode": "went",
    "round_to": "MLP widths in multiples of", "heads_multiple_of": "heads in multiples of",
    "remove_heads": "heads removed", "allow_empty": "modules may lose all", "tensor_parallel": "splits over devices",
    "attention_exponent": "exponent of attention scores", "target_params": "parameters at most",
    "target_size": "bytes at most", "target_biases": "added biases counted", "attention_unit": "unit of attention",
    "compensate": "compensation", "ridge": "ridge", "lstsq_bias": "with biases", "sequential": "fitted in turn",
    "mask_only": "zeroed in place", "remote_code": "remote code", "max_shard_size": "largest file",
    "perplexity": "perplexity on", "perplexity_windows": "windows of a text at most", "limit": "documents of a task",
    "num_fewshot": "examples in the prompt", "include_path": "own task files", "tasks": "tasks", "device": "device",
    "divergence": "divergence from the dense model",
}  # fmt: skip
SAYS_NOTHING: tuple[Any, ...] = (None, "", [], (), False)


def settings_in_words(
    header: StatsHeader | None,
    plan: Plan | None,
    made_by: Mapping[str, Any] | None,
    report: EvalReport | None,
    healed: Healed | None = None,
) -> dict[str, dict[str, str]]:
    """What was asked of every stage, and versions; without hashes, and what was left out or switched off."""
    found: dict[str, dict[str, str]] = {}
    if header:
        text, mixture = header.calibration, Mixture.read(header.calibration.dataset)
        counts = zip(mixture.sources, mixture.counts(text.nsamples), strict=True)
        parts = ", ".join(f"{source} ({count} windows)" for source, count in counts)
        found["calibrate"] = _told(text.model_dump(exclude={"nsamples"}) | {"dataset": parts})
    if plan:
        chosen = {"method": plan.method, "metric": plan.metric, "structure": plan.structure}
        found["plan"] = chosen | _told({key: value for key, value in plan.settings.items() if value != 1})
    if made_by:
        lstsq = made_by["compensate"] == "lstsq"
        keys = [key for key in APPLY if lstsq or key not in ("ridge", "lstsq_bias")]
        told = _told({key: made_by[key] for key in keys})
        found["apply"] = {("written in" if name == WORDS["dtype"] else name): value for name, value in told.items()}
    if healed:
        found["heal"] = _told(healed.settings)
    if report:
        asked = report.settings
        speed = asked.get("speed") or {}
        timed = {f"timed: {key.replace('_', ' ')}": value for key, value in speed.items()}
        found["eval"] = _told({key: value for key, value in asked.items() if key in (*WORDS, "text_column")} | timed)
    versions = (header.versions if header else {}) | (report.versions if report else {})
    return found | {"versions": dict(versions)}


def _told(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        WORDS.get(key, key.replace("_", " ")): _brief(value)
        for key, value in values.items()
        if value not in SAYS_NOTHING and not key.endswith("sha256") and (key, value) != ("text_column", "text")
    }


def _brief(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_brief, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
