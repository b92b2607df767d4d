"""METHOD.md's table: perplexities of the authors' code on SmolLM2 with K and V repeated, ours beside them.

    python tests/benchmarks/paper.py

About ten minutes on 2 cores. The figures of the authors' code stand in METHOD.md; ours are measured here.
"""

import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import expand_to_mha

from flapcli.artifacts.eval_report import load_report
from flapcli.artifacts.plan import load_plan
from flapcli.cli.app import app

# options of `flap plan`, achieved ratio and perplexity of the authors' code (METHOD.md)
ROWS = [
    ("--ratio 0.2", 0.1999, 34.11),
    ("--ratio 0.3", 0.2999, 54.58),
    ("--ratio 0.5", 0.4999, 212.4),
    ("--metric IFV --ratio 0.2", 0.1998, 33.57),
    ("--metric WIFN --ratio 0.2", 0.1999, 33.43),
    ("--structure UL-UM --ratio 0.2", 0.1703, 31.18),
    ("--structure UL-MM --remove-heads 54 --ratio 0.2", 0.1998, 33.83),
    ("--structure AL-MM --remove-heads 54 --ratio 0.2", 0.2000, 36.11),
    ("--method mag-sp --ratio 0.2", 0.1703, 610974.0),
    ("--method wanda-sp --ratio 0.2", 0.1703, 40.41),  # the authors feed pruned outputs on; ours does not
]


def flap(*args: str) -> None:
    result = CliRunner().invoke(app, args)
    if result.exit_code:
        sys.exit(f"flap {' '.join(args)}: {result.output}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, run = expand_to_mha(Path(scratch) / "mha"), Path(scratch) / "run"
        flap(
            "calibrate", str(model), "-d", str(run), *["--dataset", "pydoc", "--nsamples", "128", "--dtype", "float32"]
        )
        print(f"{'flap plan':50} {'achieved':>9} {'authors':>9} {'perplexity':>11} {'authors':>9} {'ratio':>7}")
        for options, ratio, perplexity in ROWS:
            flap("plan", "-d", str(run), *options.split())
            flap("apply", "-d", str(run))
            flap("eval", "-d", str(run), "--no-baseline", "--perplexity", "pydoc")
            achieved = load_plan(run / "plan.yaml").ratio.achieved
            ours = load_report(run / "eval.json").perplexity["pydoc"]
            print(
                f"{options:50} {achieved:9.4f} {ratio:9.4f} {ours:11.2f} {perplexity:9.2f} {ours / perplexity:7.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
