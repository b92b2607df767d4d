"""The model card of a pruned folder (README.md), in the hub's form: YAML metadata, then what people read."""

from pathlib import Path
from typing import Any

import yaml

from flapcli.checkpoint.source import DEMO, DEMO_HUB_ID
from flapcli.evaluate.report import EvalReport
from flapcli.families import Family, GgufExport, families
from flapcli.plan import Plan, load_plan
from flapcli.rundir import atomic_file

MARK = "<!-- Written by flap, and anew by `flap eval`; remove this line to keep text of your own. -->"


def renew_card(folder: Path, config: dict[str, Any], report: EvalReport) -> None:
    """Put measured perplexities into the card of a pruned folder, unless its owner took the card over."""
    path = folder / "README.md"
    if path.exists() and MARK in path.read_text(encoding="utf-8"):
        card = model_card(config, load_plan(folder / "plan.yaml"), report)
        with atomic_file(path) as scratch:
            scratch.write_text(card, encoding="utf-8")


def model_card(config: dict[str, Any], plan: Plan, report: EvalReport | None) -> str:
    """The card of a pruned folder with this config.json and plan; `report` brings perplexities where known."""
    flap = config["flap"]
    made_by = flap["made_by"]
    source = made_by["model"]["name"]
    sections = [
        f"---\n{yaml.safe_dump(_metadata(made_by), sort_keys=False)}---",
        MARK,
        f"# {Path(source).name.removesuffix('.gguf')}, pruned by flap",
        _summary(plan, made_by),
        _table(plan, flap, made_by),
        _figures(report) if report else "",
        _loading("modules" in flap, families()[config["model_type"]]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(made_by: dict[str, Any]) -> dict[str, Any]:
    """The hub's metadata: base_model and license where they are known."""
    known = {"base_model": _hub_id(made_by["model"]["name"]), "license": made_by.get("license")}
    return {key: value for key, value in known.items() if value} | {
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["flap", "pruning"],
    }


def _hub_id(name: str) -> str | None:
    """The name as a hub id; None for a path on somebody's machine."""
    if name == DEMO:
        return DEMO_HUB_ID
    return None if Path(name).is_absolute() else name


def _summary(plan: Plan, made_by: dict[str, Any]) -> str:
    how = "zeroed in place, shapes unchanged" if made_by["mask_only"] else "cut out"
    what, source = "attention heads (or KV groups) and MLP neurons", "FLAP: An et al., AAAI 2024, arXiv 2312.11983"
    if plan.method == "depth":
        what, source = "decoder layers of least block influence", "ShortGPT: Men et al., 2024, arXiv 2403.03853"
    return (
        f"{plan.ratio.achieved:.2%} of the prunable weights of `{_shown(made_by)}` are {how}: whole {what}, chosen "
        f"without retraining\n({source}). `plan.yaml` says which units stayed."
    )


def _shown(made_by: dict[str, Any]) -> str:
    name = made_by["model"]["name"]
    return _hub_id(name) or Path(name).name


def _table(plan: Plan, flap: dict[str, Any], made_by: dict[str, Any]) -> str:
    p = plan.parameters
    after = flap.get("parameters", p.model if made_by["mask_only"] else p.model_after)  # older folders lack it
    rows = {
        "method, metric, structure": f"{plan.method}, {plan.metric}, {plan.structure}",
        "ratio asked, achieved": f"{plan.ratio.requested}, {plan.ratio.achieved}",
        "compensation": made_by["compensate"] + (", sequential" if made_by.get("sequential") else ""),
        "calibration text": made_by.get("dataset") or "unknown",
        "parameters before": f"{p.model:,}",
        "parameters after": f"{after:,}",
        "biases added": ", ".join(flap["biases"]) or "none",
        "made by": f"flap {made_by['version']}",
    }
    if "source_layers" in flap:
        rows["layers"] = f"{len(flap['source_layers'])} of {len(plan.layers)}; the others are dropped whole"
    if errors := flap.get("output_error"):
        for module, pairs in errors.items():
            known = [pair for pair in pairs if pair]
            if known:
                before, after = (sum(pair[i] for pair in known) / len(known) for i in (0, 1))
                rows[f"output variance lost, {module}, mean over layers"] = (
                    f"{before:.2%} with the pruned channels' mean, {after:.2%} with least squares"
                )
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _figures(report: EvalReport) -> str:
    """Perplexities of the pruned model and of the dense one beside it."""
    seqlen = report.settings.get("seqlen")
    lines = [f"| perplexity (windows of {seqlen} tokens) | pruned | dense |", "|---|---|---|"]
    for text, value in report.perplexity.items():
        dense = f"{report.baseline.perplexity[text]:.2f}" if report.baseline else "not measured"
        lines.append(f"| {Path(text).name} | {value:.2f} | {dense} |")
    return "\n".join(lines)


def _loading(remote_code: bool, family: Family) -> str:
    option = ", trust_remote_code=True" if remote_code else ""
    why = (
        "`modeling_flap.py` in this folder gives each layer its own sizes; flap itself is not needed."
        if remote_code
        else "A stock checkpoint: no remote code, hence vLLM, TGI and SGLang load it as they load its base model."
    )
    llama_cpp = (
        "\n\nFor llama.cpp, Ollama and LM Studio: `flap export gguf` writes a GGUF file of it."
        if isinstance(family.gguf.export, GgufExport)
        else ""
    )
    return f"""## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{option})
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

{why}{llama_cpp}"""
