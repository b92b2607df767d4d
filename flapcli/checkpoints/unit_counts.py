"""What goes with one unit of a checkpoint's modules, and what its weights take as they are stored."""

from math import prod

from flapcli.architecture.shape import ModelShape, Module, Size, StoredWeights
from flapcli.checkpoints.described import Described
from flapcli.storage.dtypes import ITEM_SIZE


def stored_weights(checkpoint: Described, num_layers: int) -> StoredWeights:
    """Bytes of all tensors that count, as apply writes them by default."""
    prefix = checkpoint.family.layer.split("{i}")[0]
    layers = [
        spec for name, spec in checkpoint.tensors.items() if name.startswith(prefix) and len(spec.shape) in (2, 3)
    ]
    sizes = {ITEM_SIZE[spec.dtype] for spec in layers or checkpoint.tensors.values()}
    outputs = {
        m: [f"{checkpoint.family.output(i, m)}.bias" for i in range(num_layers)]
        for m in checkpoint.family.modules
        if m != "experts"
    }
    return StoredWeights(
        bytes=sum(spec.nbytes for spec in (*checkpoint.tensors.values(), *checkpoint.carried.values())),
        itemsize=(min(sizes), max(sizes)),
        output_biases={m: sum(name in checkpoint.tensors for name in names) for m, names in outputs.items()},
    )


def with_units(checkpoint: Described, shape: ModelShape) -> ModelShape:
    """The shape with what its units are, and what goes with one."""
    groups = {layer.num_attention_heads / layer.num_key_value_heads for layer in shape.layers if layer[1]}
    alone = all(layer.num_key_value_heads <= 1 for layer in shape.layers) or (
        checkpoint.prefers_query_heads and shape.parts_groups
    )
    single = groups != {1} and (len(groups) > 1 or alone)
    wish = checkpoint.attention_unit or ("query_head" if single else "kv_group")
    unit = shape.with_attention_unit(wish).attention_unit
    entries = _unit_entries(checkpoint, shape.model_copy(update={"attention_unit": "query_head"}), "attention")[1]
    shape = shape.model_copy(update={"attention_unit": unit})
    modules = checkpoint.family.modules
    found = {module: _unit_entries(checkpoint, shape, module) for module in modules}
    rows, biases, weights = ({module: found[module][i] for module in modules} for i in range(3))
    usual = all(rows[module] == shape.producer_rows(module) for module in modules)
    shape = shape.model_copy(update={"unit_biases": biases, "unit_rows": None if usual else rows})
    if any(checkpoint.family.module(module).inputs for module in modules):
        shape = shape.model_copy(update={"unit_weights": weights})
    if not checkpoint.family.attention.unit_tensors or shape.query_heads_per_group == 1:
        return shape
    return shape.model_copy(update={"query_head_entries": entries})


def _unit_entries(checkpoint: Described, shape: ModelShape, module: Module) -> tuple[int, int, int]:
    """What goes with one unit: rows of all producing projections, entries of their biases and of unit tensors, and
    weights, its columns of the output projection included."""
    in_layers = [name for name in checkpoint.tensors if name.startswith(checkpoint.family.layer.split("{i}")[0])]
    rows, biases, weights = 0, 0, shape.channels_per_unit(module) * shape.hidden_size
    for name, row_map in checkpoint.rows(module).items():
        count = sum(row_map.per.get(size, 0) * number for size, number in shape.kept_of_one(module).items())
        if name not in checkpoint.family.module(module).producers:
            found = next((checkpoint.tensors[n] for n in in_layers if n.endswith(f".{name}")), None)
            biases += count * prod(found.shape[1:]) if found else 0
            continue
        rows += count
        weights += count * checkpoint.input_width(module, name)
        biases += count * any(n.endswith(f".{checkpoint.family.module(module).bias(name)}") for n in in_layers)
    return rows, biases, weights


def rows_of_one(checkpoint: Described, module: Module, size: Size) -> int:
    """Rows of all producing projections for one of what `size` counts."""
    rows = checkpoint.rows(module)
    return sum(rows[name].per.get(size, 0) for name in checkpoint.family.module(module).producers)
