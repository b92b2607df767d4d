"""What a pruned folder holds besides weights: configuration, code, tokenizer, plan and model card."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

from flapcli.architecture import modeling_flap
from flapcli.architecture.family import Family
from flapcli.architecture.flap_section import FlapSection, MadeBy, ModuleLayout
from flapcli.architecture.shape import MODULES, LayerShape, ModelShape, Module
from flapcli.artifacts.model_card import model_card
from flapcli.artifacts.plan import save_plan
from flapcli.artifacts.pruned_folder import file_sizes
from flapcli.checkpoints import Checkpoint
from flapcli.pruning.layout import Layout
from flapcli.pruning.slicing import FitReport
from flapcli.storage.dtypes import TABLE

MODELING, TOKENIZER = "modeling_flap.py", "tokenizer_config.json"


def write_companions(folder: Path, layout: Layout, made_by: MadeBy, report: FitReport) -> None:
    """Write everything but weights into `folder`; `report` is what fitting the weights said."""
    section = _section(layout, made_by, report)
    if layout.stock is None:
        shutil.copyfile(modeling_flap.__file__, folder / MODELING)
    save_plan(folder / "plan.yaml", layout.plan)
    _write_tokenizer(folder, layout.checkpoint)
    config = _config(layout, section)
    (folder / "README.md").write_text(model_card(config, layout.plan, None), encoding="utf-8")
    # The last, for what is newer than config.json is the user's.
    config["flap"] = section.model_copy(update={"files": file_sizes(folder)}).as_json()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _section(layout: Layout, made_by: MadeBy, report: FitReport) -> FlapSection:
    """What config.json says under `flap`."""
    family, layers, before = layout.checkpoint.family, layout.layers, layout.checkpoint.flap
    biases = {family.module(module).output for module in MODULES} if layout.adds_bias else set()
    errors = {module: [report.errors.get((i, module)) for i in layers.source_indices] for module in MODULES}
    sizes: dict[str, Any] = {size: [getattr(layer, size) for layer in layout.sizes] for size in LayerShape._fields}
    return FlapSection(
        **sizes,
        biases=sorted(biases | set(before.biases if before else [])),
        parameters=sum(prod(spec.shape) for spec in layout.specs),
        source_layers=list(layers.source_indices) if layers.config_fields else None,
        output_error=errors if report.errors else None,
        modules=None if layout.stock else [_module(family, module, layout.checkpoint.shape) for module in MODULES],
        made_by=made_by,
    )


def _config(layout: Layout, section: FlapSection) -> dict[str, Any]:
    """config.json: the source's, with what the layout changes."""
    source, family = layout.checkpoint.config, layout.checkpoint.family
    config = {key: value for key, value in source.items() if key not in ("torch_dtype", "flap", "auto_map")}
    config |= layout.layers.config_fields
    if layout.stock:
        config |= {"architectures": [family.architecture]} | layout.stock.config_fields
    else:
        name = f"Flap{family.architecture}"
        config |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{MODELING[:-3]}.{name}"}}
    return config | _old_rope(config) | {"dtype": TABLE[layout.dtype][0], "flap": section.as_json()}


def _old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling beside the rope_parameters of transformers 5, which older readers do not know."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope or "rope_theta" in config:
        return {}
    old = {"rope_theta": rope["rope_theta"]}
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    return old if scaled.get("rope_type", "default") == "default" else old | {"rope_scaling": scaled}


def _module(family: Family, module: Module, shape: ModelShape) -> ModuleLayout:
    """The family's description of a module as modeling_flap.py reads it, so that it knows no family itself."""
    description = family.module(module)
    channels = "intermediate_size" if module == "mlp" else "num_attention_heads"
    return ModuleLayout(
        kind=module,
        output=description.output,
        producers={**description.producers},
        rows={size: shape.rows_per(size) for size in description.producers.values()},
        channels=next(name for name, size in description.producers.items() if size == channels),
    )


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, generation settings, licences and the like: copied from a folder, rebuilt from a GGUF's metadata."""
    if checkpoint.path.is_dir():
        for name, path in checkpoint.companions.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        return
    from transformers import GenerationConfig

    checkpoint.load_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / TOKENIZER).read_bytes())
    if settings.get("tokenizer_class") == "TokenizersBackend":  # whose name transformers 4 does not know
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / TOKENIZER).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    GenerationConfig.from_model_config(checkpoint.load_config()).save_pretrained(folder)
