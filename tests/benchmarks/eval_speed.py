"""What pruning gains in speed on this machine, and what --round-to does for it: SmolLM2, dense beside pruned.

    python tests/benchmarks/eval_speed.py [THREADS]

Each line times the pruned model against the dense one in turns, in one process. About five minutes on 2 cores.
"""

import sys
import tempfile
from pathlib import Path

from paper import flap

from flapcli.artifacts.eval_report import load_report

PLANS = ["--ratio 0.2", "--ratio 0.2 --round-to 32", "--ratio 0.5", "--ratio 0.5 --round-to 32"]


def main() -> None:
    threads = sys.argv[1] if len(sys.argv) > 1 else "1"
    with tempfile.TemporaryDirectory() as scratch:
        run = str(Path(scratch) / "run")
        flap("calibrate", "demo", "-d", run, "--nsamples", "64")
        for options in PLANS:
            flap("plan", "-d", run, *options.split())
            flap("apply", "-d", run)
            flap(
                "eval", "-d", run, "--speed", "--threads", threads, "--speed-batch-sizes", "1,4", "--speed-rounds", "5"
            )
            report = load_report(Path(run) / "eval.json")
            assert report.speed_details
            print(f"{options}: perplexity {report.perplexity['pydoc']:.2f}, odd widths "
                  f"{report.speed_details.odd_widths:.0%}, {threads} threads")  # fmt: skip
            for case, gain in zip(report.speed_details.cases, report.speedup, strict=True):
                for phase in ("prefill", "decode"):
                    found, possible = getattr(gain, phase), getattr(gain, f"{phase}_possible")
                    print(f"  batch {case.batch_size}, {phase}: {found.median:.2f}x ({found.low:.2f} to "
                          f"{found.high:.2f}), possible {possible:.2f}x", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
