"""What config.json says of layers with sizes of their own in transformers' words, by which vLLM sizes its caches.

modeling_flap.py reads the same under `flap`, which has what transformers knows no words for.
"""

from typing import Any

from flapcli.architecture.family import PER_LAYER
from flapcli.architecture.shape import OWN_SIZES
from flapcli.pruning.layout import Layout
from flapcli.pruning.stock_form import MODULE_OF


def per_layer_fields(layout: Layout) -> dict[str, Any]:
    """`per_layer_config`, where a layer's sizes are not those of the configuration, and leave to read the latter.

    Beside them the size of a head, which is else taken for the hidden size by a layer's own heads. Where the
    configuration's class lets nobody say it, heads are left out; all of it where a whole tells its text model's sizes
    as its own, for its class does not have them.
    """
    if (wrapper := layout.checkpoint.wrapper) and wrapper.text not in layout.checkpoint.config_in_files:
        return {}
    checkpoint, config = layout.checkpoint, layout.checkpoint.load_config()
    keys = {
        size: checkpoint.key_of(key)
        for size, key in checkpoint.family.sizes.items()
        if isinstance(key, str) and "*" not in key
    }
    keys.setdefault("head_dim", "head_dim")
    if "num_key_value_heads" not in checkpoint.family.sizes and hasattr(config, "num_key_value_heads"):
        keys["num_key_value_heads"] = "num_key_value_heads"  # always those of queries, and yet told
    said = {keys["head_dim"]: checkpoint.shape.head_dim}
    if isinstance(getattr(type(config), keys["head_dim"], None), property):
        keys, said = {size: key for size, key in keys.items() if MODULE_OF.get(size) != "attention"}, {}
    own = {}
    for place, (source, layer) in enumerate(zip(layout.layers.source_indices, layout.sizes, strict=True)):
        own[str(place)] = {
            keys[size]: value
            for size in OWN_SIZES
            if size in keys
            and (value := getattr(layer, size)) != checkpoint.sizes[size]
            and not checkpoint.lacks(source, MODULE_OF[size])
        }
    own = {place: values for place, values in own.items() if values}
    return said | (dict(zip(PER_LAYER, (own, True), strict=True)) if own else {})
