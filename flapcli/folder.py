"""What a pruned folder holds besides weights: configuration, code, tokenizer, plan and model card (DESIGN 1.5)."""

import json
import shutil
from pathlib import Path
from typing import Any

from flapcli import modeling
from flapcli.apply import Compensation
from flapcli.checkpoint.base import Checkpoint
from flapcli.families import Family
from flapcli.plan import Plan, pruned_layers, save_plan
from flapcli.shape import MODULES, LayerShape, ModelShape, Module

FORMAT = "flap-checkpoint/1"
MODELING = "modeling_flap.py"
COMPANIONS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*.jinja", "chat_template.json", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


def write_companions(
    folder: Path, checkpoint: Checkpoint, plan: Plan, made_by: dict[str, Any], dtype: str, compensation: Compensation
) -> None:
    """Write everything but weights into `folder`.

    `made_by` is what the folder was made from and how, for the cache and for people; `dtype` the weights'
    torch name; `compensation` what the weights were written with.
    """
    mask_only = made_by["mask_only"]
    layers = checkpoint.shape.layers if mask_only else pruned_layers(plan, checkpoint.shape)
    config = pruned_config(checkpoint, layers, compensation.adds_bias, dtype)
    if compensation.errors:
        config["flap"]["output_error"] = {
            module: [compensation.errors.get((i, module)) for i in range(len(layers))] for module in MODULES
        }
    config["flap"]["made_by"] = made_by
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(modeling.__file__, folder / MODELING)
    save_plan(folder / "plan.yaml", plan)
    _write_tokenizer(folder, checkpoint)
    (folder / "README.md").write_text(_model_card(checkpoint, plan, made_by), encoding="utf-8")


def pruned_config(checkpoint: Checkpoint, layers: tuple[LayerShape, ...], biases: bool, dtype: str) -> dict[str, Any]:
    """config.json: the architecture's fields as they were, and each layer's sizes under `flap`."""
    family, before = checkpoint.family, checkpoint.config
    name = f"Flap{family.architecture}"
    added = {family.module(module).output for module in MODULES} if biases else set()
    config = {key: value for key, value in before.items() if key not in ("torch_dtype", "flap")}
    config |= {
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{MODELING.removesuffix('.py')}.{name}"},
        "dtype": dtype,
        "flap": {
            "format": FORMAT,
            **{size: [getattr(layer, size) for layer in layers] for size in LayerShape._fields},
            "biases": sorted(added | set(before.get("flap", {}).get("biases", []))),
            "modules": [_describe(family, module, checkpoint.shape) for module in MODULES],
        },
    }
    return config


def _describe(family: Family, module: Module, shape: ModelShape) -> dict[str, Any]:
    """The family's description of a module as modeling.py reads it, so that it knows no family itself."""
    description = family.module(module)
    rows = {size: 1 if module == "mlp" else shape.head_dim for size in description.producers.values()}
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


def _model_card(checkpoint: Checkpoint, plan: Plan, made_by: dict[str, Any]) -> str:
    parameters = plan.parameters
    how = "zeroed in place (shapes unchanged)" if made_by["mask_only"] else "cut out"
    return f"""# {Path(plan.model.name).name}, pruned by flap

{plan.ratio.achieved:.2%} of the prunable weights of `{plan.model.name}` are {how}: whole attention
heads (or KV groups) and MLP neurons, chosen by fluctuation (FLAP, An et al., AAAI 2024) without retraining.

| | |
|---|---|
| family | {checkpoint.family.name} |
| method, metric, structure | {plan.method}, {plan.metric}, {plan.structure} |
| parameters before | {parameters.model:,} |
| parameters after (without added biases) | {parameters.model if made_by["mask_only"] else parameters.model_after:,} |
| compensation | {made_by["compensate"]} |
| made by | flap {made_by["version"]} |

`plan.yaml` says which units stayed. Load it with transformers; `{MODELING}` in this folder gives each layer
its own sizes:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```
"""
