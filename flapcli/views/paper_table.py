"""The table of the paper: perplexity and zero-shot accuracy of every method and ratio, as CSV and LaTeX.

With a zero-shot column, or WikiText2's, the paper's own figures for LLaMA-7B stand beside them, under a name of theirs.
"""

import csv
import io
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from flapcli.artifacts.sweep_results import Figures, Row, Sweep
from flapcli.evaluation.task_names import main_metric
from flapcli.storage.atomic import atomic_file

Line = list[str]
SPECIAL = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$"})


def save_tables(sweep: Sweep, folder: Path) -> list[Path]:
    """Write table.csv and table.tex into `folder`. Raises FlapError where the file system refuses."""
    head, *lines = table(sweep)
    made = {folder / "table.csv": as_csv(head, lines), folder / "table.tex": as_latex(head, lines)}
    for path, text in made.items():
        with atomic_file(path) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return list(made)


def table(sweep: Sweep) -> list[Line]:
    """Headings, then a line a model: its name, method, ratio, perplexities, tasks in percent and their average."""
    models: list[Figures] = [*([sweep.dense] if sweep.dense else []), *sweep.rows]
    texts = list(sweep.rows[0].perplexity)
    tasks = {task: metric for task, values in sweep.rows[0].tasks.items() if (metric := main_metric(task, values))}
    averaged = any(model.task_average is not None for model in models)
    head = ["model", "method", "ratio", *(f"perplexity {Path(text).name}" for text in texts), *tasks]
    lines = [[*head, *(["average"] if averaged else [])]]
    for model in models:
        kind = (model.method or sweep.settings["plan"]["method"], model.ratio) if isinstance(model, Row) else None
        line = [Path(sweep.model).name, *((kind[0], f"{kind[1]:g}") if kind else ("dense", "0"))]
        line += [f"{model.perplexity[text]:.2f}" for text in texts]
        line += [_percent(model.tasks.get(task, {}).get(metric)) for task, metric in tasks.items()]
        lines.append(line + ([_percent(model.task_average)] if averaged else []))
    return lines + list(_papers(texts, list(tasks), averaged))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _papers(texts: list[str], tasks: list[str], averaged: bool) -> Iterator[Line]:
    """The paper's lines, where it has a figure for one of the columns."""
    found = json.loads(files("flapcli.evaluation").joinpath("paper_llama_7b.json").read_text(encoding="utf-8"))
    for method, ratio, perplexity, scores, average in found["rows"]:
        cells = [f"{perplexity:.2f}" if text == "wikitext2" else "" for text in texts]
        cells += [f"{scores[task]:.2f}" if task in scores else "" for task in tasks]
        if any(cells):
            mean = [f"{average:.2f}" if average and scores.keys() <= set(tasks) else ""] if averaged else []
            yield ["LLaMA-7B (paper)", method, f"{ratio:g}", *cells, *mean]


def as_csv(head: Line, lines: list[Line]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows([head, *lines])
    return made.getvalue()


def as_latex(head: Line, lines: list[Line]) -> str:
    """A tabular for booktabs, with a rule between one model's lines and the next one's."""
    rows = [r"\begin{tabular}{lll" + "r" * (len(head) - 3) + "}", r"\toprule", _latex(head), r"\midrule"]
    before = lines[0][0]
    for line in lines:
        rows += ([r"\midrule"] if line[0] != before else []) + [_latex(line)]
        before = line[0]
    return "\n".join([*rows, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex(line: Line) -> str:
    return " & ".join(cell.translate(SPECIAL) for cell in line) + r" \\"
