"""The model card of a pruned folder (README.md), in the hub's form: YAML metadata, then what people read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flapcli.architecture.family import Family, families
from flapcli.architecture.flap_section import FlapSection, MadeBy
from flapcli.architecture.parallel import device_counts
from flapcli.architecture.wrapper import AUTO_CLASS, wrappers
from flapcli.artifacts.eval_report import EvalReport
from flapcli.artifacts.plan import Plan, load_plan
from flapcli.artifacts.pruned_folder import CARD, CARD_MARK, PrunedFolder, file_sizes, is_own_card
from flapcli.artifacts.shared_names import is_local, shared_name, shared_text
from flapcli.checkpoints.locate import DEMO, DEMO_HUB_ID
from flapcli.errors import FlapError
from flapcli.storage.atomic import atomic_file


def seal(folder: Path, config: dict[str, Any], section: FlapSection, plan: Plan) -> None:
    """Write card and config.json into a folder that holds all else; `section` is what the latter says under `flap`.

    config.json is the last, for what is newer is the user's.
    """
    card = model_card(config | {"flap": section.as_json()}, plan, None)
    (folder / CARD).write_text(card, encoding="utf-8")
    whole = section.model_copy(update={"files": file_sizes(folder)}).as_json()
    (folder / "config.json").write_text(json.dumps(config | {"flap": whole}, indent=2) + "\n", encoding="utf-8")


def renew_card(folder: PrunedFolder, report: EvalReport) -> None:
    """Put measured perplexities into the card of a pruned folder, unless its owner took the card over."""
    path = folder.path / CARD
    if is_own_card(path):
        card = model_card(folder.config, load_plan(folder.path / "plan.yaml"), report)
        if card != path.read_text(encoding="utf-8"):
            with atomic_file(path) as scratch:
                scratch.write_text(card, encoding="utf-8")


def model_card(config: Mapping[str, Any], plan: Plan, report: EvalReport | None) -> str:
    """The card of a folder with this config.json, pruned by this plan; `report` brings perplexities where known.

    Raises FlapError where the configuration is of no pruned folder.
    """
    flap = FlapSection.of(config, "the model card")
    if flap is None:
        raise FlapError("the model card is of a checkpoint that flap did not write")
    made_by, done = flap.made_by, "pruned and healed" if flap.healed else "pruned"
    sections = [
        f"---\n{yaml.safe_dump(_metadata(made_by), sort_keys=False)}---",
        CARD_MARK,
        f"# {Path(made_by.model.name).name.removesuffix('.gguf')}, {done} by flap",
        _summary(plan, flap),
        _table(plan, flap),
        _figures(report) if report and report.perplexity else "",
        _loading(flap.modules is not None, families()[plan.model.family], config["model_type"] in wrappers()),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(made_by: MadeBy) -> dict[str, Any]:
    """The hub's metadata: base_model and license where they are known."""
    known = {"base_model": _hub_id(made_by.model.name), "license": made_by.license}
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
    return None if is_local(name) else name


def _summary(plan: Plan, flap: FlapSection) -> str:
    made_by = flap.made_by
    shown = _hub_id(made_by.model.name) or shared_name(made_by.model.name)
    how = "zeroed in place" if made_by.mask_only else "cut out"
    what, source = "attention heads (or KV groups) and MLP neurons", "FLAP: An et al., AAAI 2024, arXiv 2312.11983"
    if plan.method == "depth":
        what, source = "decoder layers of least block influence", "ShortGPT: Men et al., 2024, arXiv 2403.03853"
    if plan.method == "experts":
        what, source = "experts of least saliency", "REAP: Lasby et al., 2025, arXiv 2510.13999"
    return (
        f"{plan.ratio.achieved:.2%} of the prunable weights of `{shown}` are {how}: whole {what}, chosen "
        f"without retraining\n({source}). `plan.yaml` says which units stayed."
        + (" Then the model was trained a little, to answer like the dense one." if flap.healed else "")
    )


def _table(plan: Plan, flap: FlapSection) -> str:
    p, made_by = plan.parameters, flap.made_by
    after = flap.parameters or (p.model if made_by.mask_only else p.model_after)  # older folders lack it
    rows = {
        "method, metric, structure": f"{plan.method}, {plan.metric}, {plan.structure}",
        "ratio asked, achieved": f"{plan.ratio.requested}, {plan.ratio.achieved}",
        "compensation": made_by.compensate + (", sequential" if made_by.sequential else ""),
        "calibration text": shared_text(made_by.dataset) or "unknown",
        "parameters before": f"{p.model:,}",
        "parameters after": f"{after:,}",
        "biases added": ", ".join(flap.biases) or "none",
        "tensor parallel sizes that divide every layer": ", ".join(map(str, device_counts(flap.layers()))),
        "made by": f"flap {made_by.version}",
    }
    if flap.source_layers is not None:
        rows["layers"] = f"{len(flap.source_layers)} of {len(plan.layers)}; the others are dropped whole"
    for module, pairs in (flap.output_error or {}).items():
        if known := [pair for pair in pairs if pair]:
            lost, left = (sum(shares) / len(known) for shares in zip(*known, strict=True))
            means = f"{lost:.2%} with the pruned channels' mean, {left:.2%} with least squares"
            rows[f"output variance lost, {module}, mean over layers"] = means
    if healed := flap.healed:
        text, loss, seed = (healed.settings[key] for key in ("dataset", "loss", "seed"))
        trained = "all weights of the decoder layers" if healed.settings["full"] else "adapters, merged"
        rows["healed"] = f"{trained}; {healed.best:,} tokens of {shared_text(text)}, loss {loss}, seed {seed}"
        rows["loss on held-out windows"] = f"{healed.before:.4f} before, {healed.after:.4f} after"
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _figures(report: EvalReport) -> str:
    """Perplexities of the pruned model and of the dense one beside it."""
    seqlen = report.settings.get("seqlen")
    lines = [f"| perplexity (windows of {seqlen} tokens) | pruned | dense |", "|---|---|---|"]
    for text, value in report.perplexity.items():
        measured = report.baseline.perplexity.get(text) if report.baseline else None
        dense = f"{measured:.2f}" if measured else "not measured"
        lines.append(f"| {Path(text).name} | {value:.2f} | {dense} |")
    return "\n".join(lines)


def _loading(remote_code: bool, family: Family, wrapped: bool) -> str:
    auto_class = AUTO_CLASS if wrapped else "AutoModelForCausalLM"
    option = ", trust_remote_code=True" if remote_code else ""
    runtimes = "A stock checkpoint of its base model's class: no remote code."
    if remote_code:
        runtimes = "`modeling_flap.py` in this folder gives each layer its own sizes; flap itself is not needed."
    if family.gguf.forms:
        what = "its text model" if wrapped else "it"
        runtimes += f"\n\nFor llama.cpp, Ollama and LM Studio: `flap export gguf` writes a GGUF file of {what}."
    return f"""## Loading

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained(FOLDER{option})
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

{runtimes}"""
