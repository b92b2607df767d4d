"""What a pruned folder holds besides weights: configuration, code, tokenizer, plan and model card."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from flapcli.architecture import modeling_flap
from flapcli.architecture.flap_section import FlapSection, MadeBy, ModuleLayout
from flapcli.architecture.rows import evaluate
from flapcli.architecture.shape import COUNTS, OWN_SIZES, LayerShape, Module
from flapcli.architecture.wrapper import AUTO_CLASS, changed
from flapcli.artifacts.model_card import seal
from flapcli.artifacts.plan import save_plan
from flapcli.checkpoints import Checkpoint
from flapcli.pruning.cut import cut_of
from flapcli.pruning.layout import Layout
from flapcli.pruning.per_layer import per_layer_fields
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
    seal(folder, _config(layout), section, layout.plan)


def _section(layout: Layout, made_by: MadeBy, report: FitReport) -> FlapSection:
    """What config.json says under `flap`."""
    family, layers, before = layout.checkpoint.family, layout.layers, layout.checkpoint.flap
    place = wrapper.layers if (wrapper := layout.checkpoint.wrapper) else family.layer.removesuffix(".{i}")
    outputs = {family.module(module).output for module in family.modules} if layout.adds_bias else set()
    biases = {output for output in outputs if _is_there(layout, f"{output}.bias")}
    errors = {module: [report.errors.get((i, module)) for i in layers.source_indices] for module in family.modules}
    sizes: dict[str, Any] = {size: [getattr(layer, size) for layer in layout.sizes] for size in LayerShape._fields}
    sizes = {size: values for size, values in sizes.items() if size in OWN_SIZES or any(values)}
    return FlapSection(
        **sizes,
        biases=sorted(biases | set(before.biases if before else [])),
        parameters=sum(prod(spec.shape) for spec in layout.specs),
        source_layers=list(layers.source_indices) if layers.config_fields else None,
        output_error=errors if report.errors else None,
        modules=None if layout.stock else [module_layout(layout, module) for module in family.modules],
        decoder_layers=None if layout.stock or place == "model.layers" else place,
        made_by=made_by,
    )


def _config(layout: Layout) -> dict[str, Any]:
    """config.json but for what is under `flap`: the source's, with what the layout changes."""
    checkpoint, wrapper = layout.checkpoint, layout.checkpoint.wrapper
    source = checkpoint.config_in_files if wrapper else checkpoint.config
    config = {key: value for key, value in source.items() if key not in ("torch_dtype", "flap", "auto_map")}
    name, auto_class = checkpoint.family.architecture, "AutoModelForCausalLM"
    if wrapper:
        name, auto_class = wrapper.architecture, AUTO_CLASS
    change = wrapper.changed if wrapper else changed
    fields = layout.stock.config_fields if layout.stock else per_layer_fields(layout)
    config = change(config | {"architectures": [name]}, layout.layers.config_fields | fields)
    if not layout.stock:
        classes = {auto_class: name, "AutoModel": MODEL_MAPPING_NAMES[config["model_type"]]}
        made = {auto: f"{MODELING[:-3]}.Flap{own}" for auto, own in classes.items()}
        config |= {"architectures": [f"Flap{name}"], "auto_map": made}
    return config | _old_rope(config) | {"dtype": TABLE[layout.dtype][0]}


def _old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling beside the rope_parameters of transformers 5, which older readers do not know."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope or "rope_theta" in config:
        return {}
    old = {"rope_theta": rope["rope_theta"]}
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    return old if scaled.get("rope_type", "default") == "default" else old | {"rope_scaling": scaled}


def module_layout(layout: Layout, module: Module) -> ModuleLayout:
    """The family's description of a module as modeling_flap.py reads it, so that it knows no family itself."""
    checkpoint, sizes = layout.checkpoint, layout.sizes
    description, rows = checkpoint.family.module(module), checkpoint.rows(module)
    size = COUNTS[module]
    per_size = {name: next(iter(rows[name].per.items())) for name in description.producers}
    per: dict[str, int] = {counted: number for counted, number in per_size.values()}
    per_channel = checkpoint.shape.head_dim if module == "attention" else 1
    plain = not description.of_experts and all(
        rows[name].per == {counted: per_channel} for name, (counted, _) in per_size.items()
    )
    tensors = {n: [rows[n].count(layer) for layer in sizes] for n in description.unit_tensors if _is_there(layout, n)}
    attributes = {path: _follow(layout, expression) for path, expression in description.attributes.items()}
    has_arguments = bool(description.head_arguments) and any(layer[0] != checkpoint.sizes[size] for layer in sizes)
    return ModuleLayout(
        kind=module,
        output=description.output,
        producers={n: per_size[n][0] if plain else [rows[n].count(layer) for layer in sizes] for n in per_size},
        rows=per if plain else None,
        channels=next(name for name, (counted, _) in per_size.items() if counted == size)
        if plain
        else [getattr(layer, size) * per_channel for layer in sizes],
        unit_tensors=tensors or None,
        attributes={path: values for path, values in attributes.items() if values} or None,
        experts=[layer.num_experts for layer in sizes] if description.of_experts else None,
        transposed=description.transposed or None,
        head_arguments=description.head_arguments if has_arguments else None,
        kept_heads=_kept_heads(layout) if has_arguments else None,
    )


def _is_there(layout: Layout, name: str) -> bool:
    return any(spec.name.endswith(f".{name}") for spec in layout.specs)


def _follow(layout: Layout, expression: str) -> list[int] | None:
    """An attribute's value in every layer, 0 in one without units; None where it is the dense model's in all."""

    def value(layer: LayerShape) -> int:
        heads, groups = layer[:2]
        known = layout.checkpoint.values(expression) | layer._asdict()
        known |= {"query_heads_per_group": heads // max(groups, 1)}
        return evaluate(expression, known)

    values, dense = [value(layer) for layer in layout.sizes], value(_dense(layout.checkpoint))
    return None if set(values) <= {dense, 0} else values


def _dense(checkpoint: Checkpoint) -> LayerShape:
    return LayerShape(*(checkpoint.sizes.get(size, 0) for size in LayerShape._fields))


def _kept_heads(layout: Layout) -> list[list[int]]:
    """Which of the configuration's heads every written layer keeps, through all rounds of pruning."""
    flap, shape = layout.checkpoint.flap, layout.checkpoint.shape
    before = next((m.kept_heads for m in (flap.modules if flap else None) or [] if m.kept_heads), None)
    found = []
    for layer in layout.layers.source_indices:
        own = before[layer] if before else list(range(shape.layers[layer].num_attention_heads))
        written = cut_of(layout.checkpoint, layout.plan, layer, "attention").stays["num_attention_heads"]
        masked = layout.masks(layer, "attention")
        found.append([head for head, stays in zip(own, written, strict=True) if stays or masked])
    return found


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
