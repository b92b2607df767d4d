"""The scoreboard: every way to prune beside the dense model, on the calibration's domain and on three others.

    pip download --no-deps gensim
    python tests/benchmarks/quality.py --wheel gensim-*.whl --dir /tmp/quality

SmolLM2-135M-Instruct as it is (gqa), with K and V repeated to 9 heads (mha), and Gemma-3-270m (tests/support/gemma.py),
calibrated on pydoc (`best`: as its preset says), bfloat16. Read on pydoc's test windows and, from gensim's wheel, on
encyclopedia text, which options are chosen by, on Australian news and on code, which none are: perplexity, bits per
byte, divergence from the dense model, equal next tokens; and questions of four answers. What DIR/rows.jsonl has is not
measured again, so an interrupted run goes on, and one with questions adds them to a row that lacks no more. Hours on 2
cores with 1024 windows; `--nsamples 128`, `--models gqa`, `--no-questions` and the like do a part.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from osscar import osscar
from paper import flap
from quality_texts import TASK, write_task, write_texts
from torch_pruning_peer import torch_pruning

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.gemma import gemma_folder
from support.models import expand_to_mha

from flapcli.artifacts.eval_report import Measurement, Size, TextDetails
from flapcli.artifacts.plan import load_plan
from flapcli.checkpoints import open_checkpoint
from flapcli.evaluation.measure import Measuring
from flapcli.evaluation.reference import References
from flapcli.evaluation.task_names import task_manager
from flapcli.evaluation.tasks import Tasks
from flapcli.execution.device import Runtime
from flapcli.execution.settings import EvalOptions, Execution
from flapcli.progress import Silent

RATIOS = ("0.1", "0.2", "0.3", "0.5")
# calibrate, plan, apply
METHODS = {
    "mag-sp": ("--gram", "--method mag-sp", ""),
    "wanda-sp": ("--gram", "--method wanda-sp", ""),
    "depth": ("--gram", "--method depth", ""),
    "paper": ("--gram", "", "--compensate bias"),
    "lstsq": ("--gram", "", "--compensate lstsq"),
    "no-bias": ("--gram", "", "--compensate lstsq --no-bias"),
    "best": ("--preset best", "--preset best", "--preset best"),
}
# The other unit of attention, for models that have both.
HEADS = {
    "paper-heads": ("--gram --attention-unit query_head", "", "--compensate bias"),
    "best-groups": ("--preset best --attention-unit kv_group", "--preset best", "--preset best"),
}
PEERS = {"osscar": osscar, "torch-pruning": torch_pruning}  # other people's code
AUTHORS = {"0.2": 34.11, "0.3": 54.58, "0.5": 212.4}  # the authors' code, mha, 128 windows, float32 (METHOD.md)
AIMS = {"0.2": 0.28, "0.3": 0.24, "0.5": 0.15}  # of the authors' loss over dense
Key = tuple[str, ...]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", "--news", type=Path, required=True, help="gensim's")
    parser.add_argument("--dir", type=Path, required=True, help="work folder, kept")
    parser.add_argument("--nsamples", default="128,1024")
    parser.add_argument("--models", default="mha,gqa,gemma")
    parser.add_argument("--ratios", default=",".join(RATIOS))
    parser.add_argument("--methods", default=",".join(METHODS), help=f"also {', '.join([*HEADS, *PEERS])}")
    parser.add_argument("--questions", action=argparse.BooleanOptionalAction, default=True, help="slow")
    asked = parser.parse_args()
    asked.dir.mkdir(parents=True, exist_ok=True)
    rows = Rows(asked.dir / "rows.jsonl", "texts", *(["acc"] if asked.questions else []))
    texts = write_texts(asked.wheel, asked.dir)
    tasks = write_task(asked.wheel, asked.dir / "task") if asked.questions else None
    nsamples, kinds, ratios, methods = (
        value.split(",") for value in (asked.nsamples, asked.models, asked.ratios, asked.methods)
    )
    for kind in kinds:
        with ExitStack() as stack:
            dense = Dense(kind, asked.dir, texts, tasks, stack)
            rows.measure((kind, "", "", "dense"), lambda had, d=dense: d.measured(d.model, had))
            for windows, ratio, method in product(nsamples, ratios, methods):
                key = (kind, "" if method == "mag-sp" else windows, ratio, method)
                rows.measure(key, lambda had, d=dense, n=windows, r=ratio, m=method: d.pruned(n, r, m, had))
    rows.table(list(texts))


@dataclass(frozen=True)
class Dense:
    """A model before it is pruned. It runs once for all that is made of it, which is held against what it said."""

    kind: str
    folder: Path
    texts: dict[str, str]
    tasks: Path | None
    stack: ExitStack

    @property
    def model(self) -> str:
        return model_of(self.kind, self.folder)

    @cached_property
    def _measuring(self) -> Measuring:
        options = EvalOptions(tuple(self.texts.values()), dtype="bfloat16", divergence=True)
        tasks = None
        if self.tasks:
            options = replace(options, tasks=(TASK,), include_path=str(self.tasks))
            tasks = Tasks(options, task_manager(options.tasks, options.include_path)).load(Silent())
        runtime = Runtime.of_eval(Execution(), options.dtype)
        return Measuring(options, tasks, False, runtime, Silent(), self.stack.enter_context(References(runtime)))

    @cached_property
    def read(self) -> Row:
        return self._read(self.model)

    def pruned(self, nsamples: str, ratio: str, method: str, had: Row) -> Row | None:
        """Of a checkpoint pruned by one of the METHODS, to whose run folder all ratios come; None without a peer."""
        if method in PEERS:
            made = PEERS[method](self.model, int(nsamples), float(ratio), self.folder / method)
            return {"achieved": made[1]} | self.measured(str(made[0]), had) if made else None
        calibrate, plan, apply = (METHODS | HEADS)[method]
        own = method == "best" or method in HEADS  # statistics that no other method reads
        run = self.folder / f"{self.kind}-{nsamples}-{method if own else 'pydoc'}"
        flap(
            "calibrate", self.model, "-d", str(run), "--dataset", "pydoc", "--nsamples", nsamples, *calibrate.split()
        )  # fmt: skip
        flap("plan", "-d", str(run), "--ratio", ratio, *plan.split())
        flap("apply", "-d", str(run), "--dtype", "bfloat16", *apply.split())
        return {"achieved": load_plan(run / "plan.yaml").ratio.achieved} | self.measured(str(run / "pruned"), had)

    def measured(self, name: str, had: Row) -> Row:
        """What `had` lacks: figures on all texts, for which the dense model goes first, and answers."""
        found = {}
        if "texts" not in had:
            dense = self.read
            found["texts"] = dense if name == self.model else self._read(name)
        if self.tasks and had.get("acc") is None:
            found["acc"] = self._measured(name, self._measuring, []).tasks[TASK]["acc_norm"]
        return found

    def _read(self, name: str) -> Row:
        found = self._measured(name, replace(self._measuring, tasks=None), list(self.texts.values()))
        return {name: figures(found, text) for name, text in self.texts.items()}

    @staticmethod
    def _measured(name: str, measuring: Measuring, texts: list[str]) -> Measurement:
        checkpoint = open_checkpoint(name)
        size = Size(parameters=checkpoint.shape.parameters, bytes=checkpoint.nbytes, stored_as=checkpoint.stored_as)
        found = Measurement(checkpoint=name, perplexity={}, size=size)
        measuring.measure(found, checkpoint, name, texts)
        return found


def figures(found: Measurement, text: str) -> dict[str, float]:
    details: TextDetails = found.perplexity_details[text]
    apart = details.divergence
    return {
        "perplexity": found.perplexity[text],
        "bits_per_byte": details.bits_per_byte,
        "kl": apart.kl if apart else 0.0,
        "equal_tokens": apart.equal_tokens if apart else 1.0,
    }


class Rows:
    """Measured rows by (model, windows, ratio, method), kept as JSON lines.

    Of the parts that are `needed`, a row without the first does not count; what else one lacks is measured.
    """

    def __init__(self, path: Path, *needed: str) -> None:
        self.path, self.needed = path, needed
        self.found: dict[Key, Row] = {}
        for row in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            if needed[0] in row:
                self.found[tuple(row["key"])] = row

    def measure(self, key: Key, work: Callable[[Row], Row | None]) -> None:
        """`work` is given what is known of the row, and gives what that lacks, or None where it can't be measured."""
        had = self.found.get(key, {})
        if all(had.get(part) is not None for part in self.needed) or (row := work(had)) is None:
            return
        self.found[key] = had | {"key": key, **row}
        print(json.dumps(self.found[key]), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[key]) + "\n")

    def table(self, texts: list[str]) -> None:
        """Markdown: a line for each model, number of windows, ratio and method, a column for each text."""
        print("each text: perplexity, bits per byte, divergence from dense in nats a token, equal next tokens")
        print("| model | windows | ratio | method | " + " | ".join(texts) + " | questions |")
        print("|" + "---|" * (5 + len(texts)))
        order = ["dense", *METHODS, *HEADS, *PEERS]
        for key in sorted(self.found, key=lambda k: (k[0], int(k[1] or 0), k[2], order.index(k[3]))):
            row = self.found[key]
            cells = [f"{t['perplexity']:.2f}, {t['bits_per_byte']:.3f}, {t['kl']:.3f}, {t['equal_tokens']:.1%}"
                     for t in map(row["texts"].get, texts)]  # fmt: skip
            print("| " + " | ".join([*key, *cells, "" if row.get("acc") is None else f"{row['acc']:.3f}"]) + " |")
        self.shares()

    def shares(self) -> None:
        for ratio, authors in AUTHORS.items():
            best, plain = self.found.get(("mha", "128", ratio, "best")), self.found.get(("mha", "", "", "dense"))
            if best and plain:
                ours, dense = (row["texts"]["pydoc"]["perplexity"] for row in (best, plain))
                share = (ours - dense) / (authors - dense)
                print(f"mha, 128 windows, {ratio}: best has {share:.3f} of the authors' loss (aim {AIMS[ratio]})")


def model_of(kind: str, folder: Path) -> str:
    """The demo as it is, its copy with K and V repeated, or Gemma, each made once."""
    if kind == "gqa":
        return "demo"
    if kind == "gemma":
        return str(gemma_folder())
    expanded = folder / "mha"
    return str(expanded if expanded.exists() else expand_to_mha(expanded))


if __name__ == "__main__":
    main()
