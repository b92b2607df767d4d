"""METHOD.md's second table: what compensation is worth, ours beside the figures of the independent trial there.

    python tests/benchmarks/compensation.py

SmolLM2 with K and V repeated to 9 heads, AL-AM, WIFV, 128 windows of 128 tokens of pydoc, float32. About ten
minutes on 2 cores.
"""

import sys
import tempfile
from pathlib import Path

from paper import flap

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.models import expand_to_mha

from flapcli.artifacts.eval_report import load_report

# ratio, exponent of attention scores: perplexity with none, bias and least squares (METHOD.md)
ROWS = {
    (0.2, 2): (39.89, 34.19, 27.79),
    (0.2, 1): (40.91, 34.97, 29.31),
    (0.3, 2): (88.32, 54.87, 33.63),
    (0.3, 1): (91.86, 48.78, 33.49),
    (0.5, 2): (14839, 216.1, 62.37),
}
CALIBRATION = ("--dataset", "pydoc", "--nsamples", "128", "--dtype", "float32", "--gram")
KINDS = ("none", "bias", "lstsq", "lstsq --no-bias")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, run = expand_to_mha(Path(scratch) / "mha"), Path(scratch) / "run"
        flap("calibrate", str(model), "-d", str(run), *CALIBRATION)
        print("ratio exponent  " + "".join(f"{kind:>16} {'METHOD':>9}" for kind in KINDS))
        for (ratio, exponent), expected in ROWS.items():
            flap("plan", "-d", str(run), "--ratio", str(ratio), "--attention-exponent", str(exponent))
            line = f"{ratio:5} {exponent:8}  "
            for kind, figure in zip(KINDS, (*expected, None), strict=True):
                flap("apply", "-d", str(run), "--compensate", *kind.split())
                flap("eval", "-d", str(run), "--no-baseline", "--perplexity", "pydoc")
                ours = load_report(run / "eval.json").perplexity["pydoc"]
                line += f"{ours:16.2f} {figure or '':>9}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
