"""Which tensors llama.cpp's block quantisation can't take, and what in a plan would change that.

A K-quant packs 256 neighbours of a row, an older type 32. llama-quantize stores a tensor whose rows are no
multiple of 256 in an older type instead, and one whose rows are no multiple of 32 in F16.
"""

from math import gcd

from flapcli.architecture.shape import ModelShape

K_BLOCK, OLD_BLOCK = 256, 32


def advice(shape: ModelShape) -> list[str]:
    """Lines for people; none where every tensor fits."""
    lines = []
    per_unit = shape.channels_per_unit("attention")
    heads = K_BLOCK // gcd(K_BLOCK, per_unit)
    units = shape.num_attention_heads if shape.attention_unit == "query_head" else shape.num_key_value_heads
    for name, row, multiple, of, option in (
        ("ffn_down", [s.intermediate_size for s in shape.layers], K_BLOCK, shape.intermediate_size, "--round-to"),
        ("attn_output", [shape.channels(i, "attention") for i in range(shape.num_layers)], heads, units,
         "--heads-multiple-of"),
    ):  # fmt: skip
        loose, odd = ([i for i, n in enumerate(row) if n % block] for block in (K_BLOCK, OLD_BLOCK))
        if loose:
            text = f"{name} of {_layers(loose, len(row))} has rows that are no multiple of {K_BLOCK}: K-quants will "
            text += "store it in an older type" + (f", that of {_layers(odd, len(row))} in F16 " if odd else " ")
            remedy = f"`flap plan {option} {multiple}` avoids it" if multiple <= of else "no plan avoids it"
            lines.append(text + f"({remedy}{_cheaper(name) if odd else ''})")
    if shape.hidden_size % K_BLOCK:
        lines.append(f"the hidden size {shape.hidden_size} is no multiple of {K_BLOCK}: all other weights fall back to "
                     "an older type too, whatever the plan")  # fmt: skip
    return lines


def _cheaper(name: str) -> str:
    return f", --round-to {OLD_BLOCK} only the F16" if name == "ffn_down" else ""


def _layers(which: list[int], of: int) -> str:
    if len(which) == of:
        return "every layer"
    listed = ", ".join(map(str, which[:6])) + (", ..." if which[6:] else "")
    return f"{len(which)} of {of} layers ({listed})"
