"""Decode speed in vLLM, in turns: the dense SmolLM2 by vLLM's own class and by transformers', and pruned ones, by
transformers' and by the plugin's.

    FLAP_VLLM_PYTHON=V/bin/python python tests/benchmarks/serving.py [--rounds 5] [--ratios 0.2,0.5]

Prints medians of tokens per second, and of the ratios within a round to the dense model by vLLM's own class.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import load_tokenizer
from support.vllm import Engine

BATCHES, COUNT = (1, 8), 64
PROMPT = "The standard library of Python offers"


def flap(*options: object) -> None:
    subprocess.run([sys.executable, "-m", "flapcli", *map(str, options)], check=True, stdout=subprocess.DEVNULL)


def folders(scratch: Path, ratios: list[str]) -> dict[str, tuple[Path, dict[str, str]]]:
    """By row of the table: the folder, and what else vLLM is told."""
    run = scratch / "run"
    flap("calibrate", "-d", run, "--nsamples", 128, "--dataset", "pydoc")
    made = {}
    for ratio in ["0", *ratios]:
        flap("plan", "-d", run, "--ratio", ratio)
        flap("apply", "-d", run, "--out", scratch / ratio, "--dtype", "float32")
        made[f"pruned by {ratio}"] = (scratch / ratio, {})
    dense, _ = made.pop("pruned by 0")
    return {"dense": (dense, {}), "dense, --model-impl transformers": (dense, {"model_impl": "transformers"})} | made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ratios", default="0.2,0.5")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = folders(Path(scratch), options.ratios.split(","))
        engines = {plugins: Engine(Path(scratch) / f"log{plugins}", plugins) for plugins in ("", "flap")}
        rows |= {f"{row}, by the plugin": folder for row, folder in rows.items() if row.startswith("pruned")}
        ids = load_tokenizer(rows["dense"][0])(PROMPT).input_ids
        speeds: dict[tuple[str, int], list[float]] = {(row, batch): [] for row in rows for batch in BATCHES}
        for batch in BATCHES * options.rounds:
            for row, (folder, settings) in rows.items():
                engine = engines["flap" if "plugin" in row else ""]
                found = engine.ask(folder, [ids] * batch, COUNT, turns=3, **settings)
                assert "error" not in found, found["error"]
                speeds[row, batch].append(batch * COUNT / min(found["seconds"][1:]))
        for engine in engines.values():
            engine.close()
    print(f"vLLM {engine.version}, float32, eager: tokens per second, and over the dense model in the same round")
    print("\n| | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |\n" + "|---" * (len(BATCHES) + 1) + "|")
    for row in rows:
        cells = []
        for batch in BATCHES:
            ratios = [ours / dense for ours, dense in zip(speeds[row, batch], speeds["dense", batch], strict=True)]
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells.append(f"{statistics.median(speeds[row, batch]):.1f}: {span}")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
