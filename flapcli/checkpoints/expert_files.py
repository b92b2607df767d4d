"""Experts that files hold one by one, as the tensors of all of them that transformers makes of these."""

import re
from collections.abc import Iterable

from flapcli.architecture.family import Family
from flapcli.errors import FlapError
from flapcli.storage.safetensors_file import TensorSpec

Parts = list[list[str]]  # for every expert the names of what makes its part of a tensor


def experts_in_files(family: Family, names: Iterable[str]) -> dict[str, Parts]:
    """Tensors of all experts by their names in the model, and which of `names` (the model's too) each is made of.

    Raises FlapError where an expert is missing.
    """
    files = family.experts.files if family.experts else {}
    known = {
        re.escape(part).replace(r"\{e\}", r"(\d+)"): (whole, place, len(parts))
        for whole, parts in files.items()
        for place, part in enumerate(parts)
    }
    found: dict[str, dict[int, list[str]]] = {}
    prefix = re.escape(family.layer).replace(r"\{i\}", r"\d+")
    for name in names if known else ():
        for pattern, (whole, place, count) in known.items():
            if match := re.fullmatch(rf"({prefix}\.){pattern}", name):
                of_expert = found.setdefault(match[1] + whole, {}).setdefault(int(match[2]), [""] * count)
                of_expert[place] = name
    for whole, experts in found.items():
        if sorted(experts) != list(range(len(experts))) or not all(all(parts) for parts in experts.values()):
            raise FlapError(f"{whole} is stored expert by expert, and one of its {len(experts)} experts lacks a tensor")
    return {whole: [experts[i] for i in range(len(experts))] for whole, experts in found.items()}


def spec_of(whole: str, experts: Parts, specs: dict[str, TensorSpec]) -> TensorSpec:
    """What the tensor of all experts is. Raises FlapError where they differ in shape or dtype."""
    shapes = {tuple(specs[name].shape for name in parts) for parts in experts}
    kinds = {specs[name].dtype for parts in experts for name in parts}
    if len(shapes) > 1 or len(kinds) > 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
        raise FlapError(f"{whole} is stored expert by expert, and these differ in shape or type")
    [parts] = shapes
    return TensorSpec(whole, (len(experts), sum(rows for rows, _ in parts), parts[0][1]), kinds.pop())
