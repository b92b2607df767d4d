"""What a forward pass costs by formula, from the sizes of every layer. No torch."""

from flapcli.shape import MODULES, ModelShape


def macs_per_token(shape: ModelShape, context: float, vocabulary: int = 0) -> int:
    """Multiply-accumulates of one token's forward pass.

    Every weight of a projection is used once: sum over layers of the prunable weights. Attention adds
    2 * heads * head_dim * `context` (queries by keys, then scores by values), `context` being how many positions
    the token attends to on average. The output head adds hidden_size * `vocabulary`; 0 where it is not computed.
    Norms, rotations and activations are left out: they multiply no matrices.
    """
    projections = sum(
        shape.unit_parameters(module) * shape.units(layer, module)
        for layer in range(shape.num_layers)
        for module in MODULES
    )
    attention = sum(2 * layer.num_attention_heads * shape.head_dim * context for layer in shape.layers)
    return round(projections + attention + shape.hidden_size * vocabulary)


def odd_width_share(shape: ModelShape, multiple: int = 16) -> float:
    """Share of the layers whose MLP width is no multiple of `multiple`, which matrix kernels may run slower on."""
    widths = [layer.intermediate_size for layer in shape.layers if layer.intermediate_size]
    return sum(width % multiple != 0 for width in widths) / len(widths) if widths else 0.0
