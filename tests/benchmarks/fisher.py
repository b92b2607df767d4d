"""CPU time and peak memory of `flap calibrate --fisher`, each as a ratio to those without it in the same run.

    python tests/benchmarks/fisher.py [--windows 128] [--rounds 2] [-- OPTIONS OF CALIBRATE]

On SmolLM2 (the demo) and pydoc, whole processes in turns, by their CPU time, which other load on the machine changes
little; what loading alone takes is measured by one window.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from speed import finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, int]]] = {"loading": [], "plain": [], "fisher": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, windows, more in (
                ("loading", 1, ()), ("plain", args.windows, ()), ("fisher", args.windows, ("--fisher",)),
            ):  # fmt: skip
                out = str(Path(folder) / f"{name}.safetensors")
                command = ("-m", "flapcli", "calibrate", "demo", "--out", out, "--force", "--nsamples", str(windows))
                used = finished(*command, *more, *args.options)
                found[name].append((used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
    peak = {name: max(p for _, p in runs) / 1e6 for name, runs in found.items()}
    for name in found:
        print(f"{name}: {seconds[name]:.2f} s, peak {peak[name]:,.0f} MB")
    ratio = peak["fisher"] / peak["plain"]
    print(f"whole processes: {seconds['fisher'] / seconds['plain']:.2f} times as long, {ratio:.2f} of the memory")
    work = {name: seconds[name] - seconds["loading"] for name in ("plain", "fisher")}
    print(f"without loading: {work['fisher'] / work['plain']:.2f} times as long")


if __name__ == "__main__":
    main()
