"""Holds a checkpoint's tensors and settings against what its description expects, before anything is computed."""

from collections.abc import Callable, Iterator
from typing import Any

from flapcli.architecture.family import MAX_SIZE, PER_LAYER
from flapcli.architecture.shape import ModelShape
from flapcli.checkpoints.described import Described
from flapcli.errors import FlapError
from flapcli.storage.dtypes import CODES


def refuse_misfits(checkpoint: Described, shape: ModelShape) -> None:
    """Raise FlapError naming what is missing, unknown, or of a shape that the configuration does not say."""
    if wrong := list(_misfits(checkpoint, shape)):
        more = f" and {len(wrong) - 4} more" if wrong[4:] else ""
        raise FlapError(f"{checkpoint.name}: {'; '.join(wrong[:4])}{more}")


def refuse_quantised(checkpoint: Described) -> None:
    """Raise FlapError where config.json says that weights are quantised, which every loader would act on."""
    if quantised := checkpoint.config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise FlapError(
            f"{checkpoint.name} is quantised ({method}: config.json has a quantization_config), and flap prunes plain "
            "weights: give the model as it was before quantisation, or remove that key where they are plain"
        )


def refuse_odd_settings(checkpoint: Described) -> None:
    """Raise FlapError for settings that loaders would choke on, or take for something else without a word."""
    checkpoint.generation  # noqa: B018  what can't be read is told before any work
    if checkpoint.config.get(PER_LAYER[0]) and not checkpoint.flap:
        raise FlapError(
            f"{checkpoint.name}: {PER_LAYER[0]} in config.json gives single layers settings of their own, which flap "
            "knows of folders that it pruned alone"
        )
    known = (None, "auto", *CODES, *(f"torch.{name}" for name in CODES))
    fine: dict[str, Callable[[Any], bool]] = {
        "dtype": lambda value: value in known,
        "torch_dtype": lambda value: value in known,
        "vocab_size": lambda value: value is None or (type(value) is int and 0 < value <= MAX_SIZE),
        "_attn_implementation": lambda value: value is None or isinstance(value, str | dict),
        "max_position_embeddings": lambda value: value is None or (type(value) is int and value > 0),
    }
    for key, is_fine in fine.items():
        if not is_fine(value := checkpoint.config.get(key)):
            raise FlapError(f"{checkpoint.name}: {key} in config.json is {value!r:.60}, which is none")


def refuse_untied(checkpoint: Described) -> None:
    """Raise FlapError where head and embedding are stored both, and differ, though config.json ties them."""
    head, embedding = f"{checkpoint.family.head}.weight", f"{checkpoint.family.outside_layers[0]}.weight"
    if not checkpoint.tied or not {head, embedding} <= checkpoint.stored.keys():
        return
    one, other = checkpoint.read(head), checkpoint.read(embedding)
    if one.shape != other.shape or not bool((one == other).all()):
        raise FlapError(
            f"{checkpoint.name}: config.json says that head and embedding are one matrix (tie_word_embeddings), and "
            f"{head} and {embedding} differ: set tie_word_embeddings to false, or remove the one that is not meant"
        )


def _misfits(checkpoint: Described, shape: ModelShape) -> Iterator[str]:
    """What is missing, unknown, or of a shape that the configuration does not say."""
    yield from (
        f"layer {i} has no {shape.unit(m)} of its {m}, as older versions of flap wrote it: prune the model anew"
        for i in range(shape.num_layers)
        for m in checkpoint.family.modules
        if m != "experts" and not shape.units(i, m) and not checkpoint.lacks(i, m)
    )
    expected = expected_shapes(checkpoint, shape)
    yield from (
        f"tensor {name} is missing" for name in _required(checkpoint, shape, expected) if name not in checkpoint.tensors
    )
    vocabulary = _vocabulary_shapes(checkpoint, shape)
    for name, want in (expected | vocabulary).items():
        spec = checkpoint.tensors.get(name)
        if spec is not None and spec.shape != want:
            mend = " by config.json's vocab_size: mend it, or the weights" if name in vocabulary else ""
            yield f"tensor {name} has shape {list(spec.shape)}, expected {list(want)}{mend}"
    layers = [checkpoint.family.layer.format(i=i) for i in range(shape.num_layers)]
    whole = {f"{layer}.{part}" for layer in layers for part in checkpoint.family.untouched_in_layer}
    whole.update(checkpoint.family.outside_layers)
    beside = [part for module in checkpoint.family.modules for part in checkpoint.family.module(module).beside]
    expected |= {f"{layer}.{part}": () for layer in layers for part in beside}
    for name in checkpoint.tensors:
        if name not in expected and name.rpartition(".")[0] not in whole:
            yield f"tensor {name} is not known to family {checkpoint.family.name}"


def _required(checkpoint: Described, shape: ModelShape, expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Tensors without which a loader would make up its own: all weights, and biases that config.json announces."""
    family = checkpoint.family
    yield from (f"{part}.weight" for part in family.outside_layers if not (checkpoint.tied and part == family.head))
    announced = {
        part
        for module in family.modules
        if checkpoint.setting(family.bias_options.get(module, "")) is True
        for part in (family.module(module).output, *family.module(module).producers)
    }
    there = {name.rpartition(".")[0] for name in checkpoint.tensors if not name.endswith(".bias")}
    announced |= set(checkpoint.flap.biases if checkpoint.flap and checkpoint.flap.modules else [])
    for i in range(shape.num_layers):
        prefix = family.layer.format(i=i)
        yield from (f"{prefix}.{part}.weight" for part in family.untouched_in_layer if f"{prefix}.{part}" not in there)
        yield from (name for part in announced if (name := f"{prefix}.{part}.bias") in expected)
    yield from _weights_of_modules(checkpoint, shape)


def _weights_of_modules(checkpoint: Described, shape: ModelShape) -> Iterator[str]:
    """Weights of the projections of all modules that have units, and what goes beside them."""
    for module in checkpoint.family.modules:
        description = checkpoint.family.module(module)
        parts = [description.weight(name) for name in (description.output, *description.producers)]
        for i in range(shape.num_layers):
            if shape.units(i, module):
                prefix = checkpoint.family.layer.format(i=i)
                yield from (f"{prefix}.{part}" for part in (*parts, *description.beside))


def _vocabulary_shapes(checkpoint: Described, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shapes of embedding and head where config.json says them: loaders reserve what it says."""
    rows: Any = checkpoint.config.get("vocab_size")  # config.json's own: what it leaves out, the tensors say
    parts = (checkpoint.family.outside_layers[0], checkpoint.family.head) if rows is not None else ()
    key = checkpoint.family.sizes.get("embedding_size")
    width = checkpoint.setting(key) if isinstance(key, str) else shape.hidden_size
    return {f"{part}.weight": (rows, width) for part in parts}


def expected_shapes(checkpoint: Described, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights and possible biases of the projections that pruning touches."""
    expected: dict[str, tuple[int, ...]] = {}
    order = -1 if checkpoint.family.transposed else 1
    for module in checkpoint.family.modules:
        description, rows = checkpoint.family.module(module), checkpoint.rows(module)
        for i, layer in enumerate(shape.layers):
            prefix, channels = f"{checkpoint.family.layer.format(i=i)}.", shape.channels(i, module)
            every = (layer.num_experts,) * description.of_experts
            turn = -1 if description.transposed else order
            if checkpoint.lacks(i, module):
                continue
            expected[prefix + description.bias(description.output)] = (*every, shape.hidden_size)
            for name in description.unit_tensors:
                if found := checkpoint.tensors.get(prefix + name):
                    expected[found.name] = (rows[name].count(layer), *found.shape[1:]) if channels else found.shape
            if channels == 0:  # pruned away whole: at most the bias is there
                continue
            columns = layer.expert_size if description.of_experts else channels
            weight = prefix + description.weight(description.output)
            expected[weight] = (*every, *(shape.hidden_size, columns)[::turn])
            for name in description.producers:
                count, width = rows[name].count(layer), checkpoint.input_width(module, name)
                expected[prefix + description.weight(name)] = (*every, *(count, width)[::turn])
                expected[prefix + description.bias(name)] = (*every, count)
    return expected
