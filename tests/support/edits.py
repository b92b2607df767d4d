"""A plan edited in its text, as people edit it."""

import re
from pathlib import Path

from flapcli.architecture.shape import Module
from flapcli.artifacts.plan import load_plan


def edit_keep(run: Path, *places: tuple[int, Module], keep: str = "") -> None:
    """In the run's plan, let these (layer, module) keep the units that `keep` names, by default none."""
    path = run / "plan.yaml"
    lines = path.read_text().splitlines()
    for layer, module in places:
        start = next(i for i, line in enumerate(lines) if line.strip() == f"- index: {layer}")
        row = next(i for i in range(start, start + 5) if lines[i].strip().startswith(f"{module}:"))
        lines[row] = re.sub('keep: ".*?"', f'keep: "{keep}"', lines[row])
    path.write_text("\n".join(lines))


def even_plan(run, folder, flap, whole=False):
    """A plan in `folder` by the statistics of `run`, which keeps the same units in all three layers.

    `whole`: attention keeps all.
    """
    flap("plan", "-d", run, "--out", folder / "plan.yaml", "--ratio", "0")
    unit = load_plan(folder / "plan.yaml").layers[0].attention
    heads = "0,2" if unit.of == 3 else "0,2,3,5"
    for module, keep in (("attention", unit.keep if whole else heads), ("mlp", "0-39")):
        edit_keep(folder, *((layer, module) for layer in range(3)), keep=keep)
