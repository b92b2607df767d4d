"""What flap prunes, a row for every model_type: families, sources read as one, and wholes around a text model."""

from flapcli.architecture.family import Family, families
from flapcli.architecture.source import sources
from flapcli.architecture.wrapper import wrappers

Row = dict[str, str]


def catalogue() -> list[Row]:
    """Rows for people and for --json, by name."""
    rows = [_of_family(family) for family in families().values()]
    for source in sources().values():
        native = _of_family(families()[source.converts_to])
        notes = f"read and written as {source.converts_to}" + f"; {source.notes}" * bool(source.notes)
        rows.append(native | {"family": source.name, "models": source.covers, "notes": notes})
    for wrapper in wrappers().values():
        rows.append(
            dict.fromkeys(rows[0], "as its text model")
            | {"family": wrapper.name, "models": wrapper.covers, "architecture": wrapper.architecture}
            | {"notes": "its text model is pruned, all other parts are carried over (not into GGUF)", "gguf_why": ""}
        )
    return sorted(rows, key=lambda row: row["family"])


def _of_family(family: Family) -> Row:
    grouped = family.sizes.get("num_key_value_heads")
    whole = {m: reason for m in family.modules if (reason := family.module(m).stays_whole)}
    symbols = {symbol[0] for blocks in family.attention.producers.values() for block in blocks for symbol in block}
    own_keys = grouped is None or not symbols & {"k", "v"}  # as all heads have under latent attention
    unit = "head" if own_keys else "query_head" if grouped == 1 else "kv_group, query_head"
    sayable = [word for word, key in (("heads", "head_dim"), ("neurons", "intermediate_size")) if key in family.sizes]
    if "attention" in whole:
        unit, sayable = "none", [word for word in sayable if word != "heads"]
    uneven = family.gguf.uneven
    slopes = "ALiBi: stock with all heads only" if family.attention.head_arguments else ""
    refused = [f"not where {refusal.key} is {refusal.values[0]!r}" for refusal in family.refuses]
    notes = [family.notes, slopes, *(f"{m} stays whole: {why}" for m, why in whole.items()), *refused]
    return {
        "family": family.name,
        "models": family.covers,
        "architecture": family.architecture,
        "unit": unit,
        "prunable": ", ".join(m for m in family.modules if m not in whole),
        "stock_when_even": ", ".join(sayable) or "no",
        "gguf": ", ".join(f.architecture + " if even" * (not f.per_layer) for f in family.gguf.forms) or "no",
        "gguf_why": uneven if isinstance(uneven, str) else "",
        "notes": "; ".join(filter(None, notes)),
    }
