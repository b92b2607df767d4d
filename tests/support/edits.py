"""A plan edited in its text, as people edit it."""

import re
from pathlib import Path

from flapcli.architecture.shape import Module


def edit_keep(run: Path, *places: tuple[int, Module], keep: str = "") -> None:
    """In the run's plan, let these (layer, module) keep the units that `keep` names, by default none."""
    path = run / "plan.yaml"
    lines = path.read_text().splitlines()
    for layer, module in places:
        start = next(i for i, line in enumerate(lines) if line.strip() == f"- index: {layer}")
        row = next(i for i in range(start, start + 5) if lines[i].strip().startswith(f"{module}:"))
        lines[row] = re.sub('keep: ".*?"', f'keep: "{keep}"', lines[row])
    path.write_text("\n".join(lines))
