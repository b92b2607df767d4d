"""What a pruned folder holds besides weights: configuration, code, tokenizer, plan and model card (DESIGN 1.5)."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

from flapcli import modeling
from flapcli.card import model_card
from flapcli.checkpoint.base import Checkpoint
from flapcli.compensation import Compensation
from flapcli.dropped import Depth
from flapcli.families import Family
from flapcli.plan import Plan, save_plan
from flapcli.safetensors_io import read_header
from flapcli.shape import MODULES, LayerShape, ModelShape, Module
from flapcli.stock import Stock

FORMAT = "flap-checkpoint/1"
MODELING = "modeling_flap.py"
COMPANIONS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.jinja", "chat_template.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


def write_companions(
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    made_by: dict[str, Any],
    layers: tuple[LayerShape, ...],
    depth: Depth,
    dtype: str,
    compensation: Compensation,
    stock: Stock | None,
) -> None:
    """Write everything but weights into `folder`, where those are already.

    `made_by` is what the folder was made from and how, for the cache and for people; `layers` the sizes of the
    written weights, `depth` which layers of the source they are, `dtype` their torch name, `compensation` what they
    were written with; `stock` makes a folder of the family's own class.
    """
    family, written = checkpoint.family, folder.glob("*.safetensors")
    config = {key: value for key, value in checkpoint.config.items() if key not in ("torch_dtype", "flap", "auto_map")}
    added = {family.module(module).output for module in MODULES} if compensation.adds_bias else set()
    flap: dict[str, Any] = {
        "format": FORMAT,
        **{size: [getattr(layer, size) for layer in layers] for size in LayerShape._fields},
        "biases": sorted(added | set(checkpoint.config.get("flap", {}).get("biases", []))),
        "parameters": sum(prod(spec.shape) for path in written for spec in read_header(path).tensors.values()),
    }
    if depth.fields:
        config |= depth.fields
        flap["source_layers"] = list(depth.stay)
    if compensation.errors:
        flap["output_error"] = {
            module: [compensation.errors.get((i, module)) for i in depth.stay] for module in MODULES
        }
    if stock:
        config |= {"architectures": [family.architecture]} | stock.fields
    else:
        name = f"Flap{family.architecture}"
        config |= {
            "architectures": [name],
            "auto_map": {"AutoModelForCausalLM": f"{MODELING[:-3]}.{name}"},
        }
        flap["modules"] = [_describe(family, module, checkpoint.shape) for module in MODULES]
        shutil.copyfile(modeling.__file__, folder / MODELING)
    config |= _old_rope(config) | {"dtype": dtype, "flap": flap | {"made_by": made_by}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_plan(folder / "plan.yaml", plan)
    _write_tokenizer(folder, checkpoint)
    (folder / "README.md").write_text(model_card(config, plan, None), encoding="utf-8")


def _old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling beside the rope_parameters of transformers 5, which older readers do not know."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope or "rope_theta" in config:
        return {}
    old = {"rope_theta": rope["rope_theta"]}
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    return old if scaled.get("rope_type", "default") == "default" else old | {"rope_scaling": scaled}


def _describe(family: Family, module: Module, shape: ModelShape) -> dict[str, Any]:
    """The family's description of a module as modeling.py reads it, so that it knows no family itself."""
    description = family.module(module)
    rows = {size: shape.rows_per(size) for size in description.producers.values()}
    channels = "intermediate_size" if module == "mlp" else "num_attention_heads"
    return {
        "kind": module,
        "output": description.output,
        "producers": description.producers,
        "rows": rows,
        "channels": next(name for name, size in description.producers.items() if size == channels),
    }


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Tokenizer, generation settings and licences: copied from a folder, rebuilt from a GGUF's metadata."""
    if checkpoint.path.is_dir():
        for pattern in COMPANIONS:
            for path in checkpoint.path.glob(pattern):
                if path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        return
    from transformers import GenerationConfig

    checkpoint.load_tokenizer().save_pretrained(folder)
    GenerationConfig.from_model_config(checkpoint.load_config()).save_pretrained(folder)
