"""The scoreboard: every way to prune beside the dense model, on the calibration's domain and on another one.

    pip download --no-deps gensim
    python tests/benchmarks/quality.py --news gensim-*.whl --dir /tmp/quality

SmolLM2-135M-Instruct as it is (gqa) and with K and V repeated to 9 heads (mha), with `--models gemma` Gemma-3-270m
(tests/support/gemma.py), calibrated on pydoc (`best`: as its preset says), bfloat16. Perplexity on pydoc's test windows
and on Australian news (the Lee corpus in gensim's wheel). Rows that are in DIR/rows.jsonl are not measured again, so an
interrupted run goes on. Hours on 2 cores with 1024 windows; `--nsamples 128` does a part.
"""

import argparse
import json
import sys
import zipfile
from itertools import product
from pathlib import Path

from paper import flap

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.gemma import gemma_folder
from support.models import expand_to_mha

from flapcli.artifacts.eval_report import load_report
from flapcli.artifacts.plan import load_plan

NEWS_MEMBER = "gensim/test/test_data/lee_background.cor"
NEWS_FROM, NEWS_LENGTH = 0.6, 30_000  # characters: past what METHOD.md calibrates on, about 60 windows
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
# Single query heads in the place of KV groups, for models that have these.
HEADS = {
    "paper-heads": ("--gram --attention-unit query_head", "", "--compensate bias"),
    "best-heads": ("--preset best --attention-unit query_head", "--preset best", "--preset best"),
}
AUTHORS = {"0.2": 34.11, "0.3": 54.58, "0.5": 212.4}  # the authors' code, mha, 128 windows, float32 (METHOD.md)
AIMS = {"0.2": 0.28, "0.3": 0.24, "0.5": 0.15}  # of the authors' loss over dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--news", type=Path, required=True, help="gensim's wheel")
    parser.add_argument("--dir", type=Path, required=True, help="work folder, kept")
    parser.add_argument("--nsamples", default="128,1024")
    parser.add_argument("--models", default="mha,gqa")
    parser.add_argument("--ratios", default=",".join(RATIOS))
    parser.add_argument("--methods", default=",".join(METHODS))
    asked = parser.parse_args()
    asked.dir.mkdir(parents=True, exist_ok=True)
    rows = Rows(asked.dir / "rows.jsonl")
    news = write_news(asked.news, asked.dir / "news.txt")
    wanted = [value.split(",") for value in (asked.nsamples, asked.models, asked.ratios, asked.methods)]
    for kind in wanted[1]:
        rows.measure((kind, "", "", "dense"), lambda kind=kind: dense(model_of(kind, asked.dir), asked.dir, news))
    for nsamples, kind, ratio, method in product(*wanted):
        key = (kind, "" if method == "mag-sp" else nsamples, ratio, method)
        rows.measure(key, lambda k=key, n=nsamples: pruned(*k[::3], n, k[2], asked.dir, news))
    rows.table()


class Rows:
    """Measured rows by (model, windows, ratio, method), kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {tuple(row["key"]): row for row in map(json.loads, lines)}

    def measure(self, key: tuple[str, ...], work) -> None:
        if key in self.found:
            return
        self.found[key] = {"key": key, **work()}
        print(json.dumps(self.found[key]), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[key]) + "\n")

    def table(self) -> None:
        """Markdown: a line for each model, number of windows and ratio, a column for each method: pydoc / news."""
        print("| model | windows | ratio | " + " | ".join(METHODS) + " |\n|" + "---|" * (3 + len(METHODS)))
        lines = sorted({key[:3] for key in self.found if key[1]}, key=lambda k: (k[0] != "mha", int(k[1]), k[2]))
        for kind, nsamples, ratio in lines:
            cells = []
            for method in METHODS:
                row = self.found.get((kind, "" if method == "mag-sp" else nsamples, ratio, method))
                cells.append(f"{row['pydoc']:.2f} / {row['news']:.1f}" if row else "")
            print(f"| {kind} | {nsamples} | {ratio} | {' | '.join(cells)} |")
        for (kind, *_, method), row in self.found.items():
            if method == "dense":
                print(f"dense {kind}: {row['pydoc']:.2f} / {row['news']:.1f}")
        self.shares()

    def shares(self) -> None:
        for ratio, authors in AUTHORS.items():
            best, plain = self.found.get(("mha", "128", ratio, "best")), self.found.get(("mha", "", "", "dense"))
            if best and plain:
                share = (best["pydoc"] - plain["pydoc"]) / (authors - plain["pydoc"])
                print(f"mha, 128 windows, {ratio}: best has {share:.3f} of the authors' loss (aim {AIMS[ratio]})")


def model_of(kind: str, folder: Path) -> str:
    """The demo as it is, its copy with K and V repeated, or Gemma, each made once."""
    if kind == "gqa":
        return "demo"
    if kind == "gemma":
        return str(gemma_folder())
    expanded = folder / "mha"
    return str(expanded if expanded.exists() else expand_to_mha(expanded))


def write_news(wheel: Path, path: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(NEWS_MEMBER).decode()
    start = int(NEWS_FROM * len(text))
    path.write_text(text[start : start + NEWS_LENGTH])
    return str(path)


def perplexities(run: Path, checkpoint: list[str], news: str) -> dict[str, float]:
    texts = ["--perplexity", "pydoc", "--perplexity", news]
    flap("eval", *checkpoint, "-d", str(run), "--no-baseline", "--dtype", "bfloat16", "--force", *texts)
    found = load_report(run / "eval.json").perplexity
    return {"pydoc": found["pydoc"], "news": found[news]}


def dense(model: str, folder: Path, news: str) -> dict[str, float]:
    return perplexities(folder / "dense", [model], news)


def pruned(kind: str, method: str, nsamples: str, ratio: str, folder: Path, news: str) -> dict[str, float]:
    calibrate, plan, apply = (METHODS | HEADS)[method]
    run = folder / f"{kind}-{nsamples}-{method if method == 'best' or method in HEADS else 'pydoc'}"
    flap(
        "calibrate", model_of(kind, folder), "-d", str(run), "--dataset", "pydoc", "--nsamples", nsamples,
        *calibrate.split(),
    )  # fmt: skip
    flap("plan", "-d", str(run), "--ratio", ratio, *plan.split())
    flap("apply", "-d", str(run), "--dtype", "bfloat16", *apply.split())
    return {"achieved": load_plan(run / "plan.yaml").ratio.achieved} | perplexities(run, [], news)


if __name__ == "__main__":
    main()
