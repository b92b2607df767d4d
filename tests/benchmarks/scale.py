"""Time and memory of the stages on one generated layer of Llama-2-70B's sizes, and what 80 of them take.

    python tests/benchmarks/scale.py [--windows 4] [--divide 1] [--skip-sequential] [--folder DIR]

One bfloat16 layer of 8,192 channels, 28,672 neurons and 64 heads in 8 KV groups goes through streamed calibrate with
Gram matrices, plan, and apply with bias, with least squares and sequential. Printed are seconds, and peak resident
memory above the import of torch and transformers beside the formula's; with `--divide` of a layer all of whose sizes
are divided so. Before it, that peak on small layers, of which there are 2 and then 4, on 8 windows and then 32: it must
not grow but by the formula. Needs 15 GB of disk.
"""

import argparse
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from memory import SEQLEN, sizes

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.generated import LLAMA_70B, divided, generate
from support.timed_commands import flap

ONE = LLAMA_70B | {"num_hidden_layers": 1, "vocab_size": 512}
SMALL = ONE | {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 1}
RATIO, LAYERS, GROWTH = 0.2, 80, 1.1
STAGES: dict[str, list[object]] = {
    "calibrate --stream --gram": ["calibrate", "MODEL", "--stream", "--gram", "--dataset", "pydoc", "--seqlen", SEQLEN],
    "plan": ["plan", "--ratio", RATIO, "--structure", "UL-UM"],
    "apply, bias": ["apply", "--compensate", "bias", "--force"],
    "apply, lstsq": ["apply", "--compensate", "lstsq", "--force"],
    "apply, sequential": ["apply", "--compensate", "lstsq", "--sequential", "--force"],
}


def formula(config: dict, nsamples: int) -> dict[str, float]:
    """Bytes of RAM, whatever the number of layers.

    Calibration's sums are of a layer's two modules. A cut holds a weight, what is kept of it and what was written
    before. A solve holds the Gram matrix, the factor of the kept channels', in float64 where tokens are too few to tell
    them apart, and the kept columns, once in float32 and once as stored; the sequential one two streams, a layer and
    the batch beside it, and first the kept channels' own sums and the closed form's columns instead of the Gram matrix.
    """
    s, neurons, kept = sizes(config, nsamples), config["intermediate_size"], 1 - RATIO
    factor = kept**2 * (2 if nsamples * SEQLEN < kept * neurons else 1)
    heads = config["num_attention_heads"] * config["head_dim"]
    gram, weight = 4 * neurons**2, 2 * neurons * config["hidden_size"]
    working, solve = 4 * s["batch"] + 100e6, gram * (1 + factor) + weight * (1 + 2 * kept + 2 * (1 - kept))
    refit = gram * (kept**2 + factor) + weight * (1 + 3 * 2 * kept)
    return {
        "calibrate --stream --gram": s["hidden"] + 2 * s["layer"] + gram + 4 * heads**2 + working,
        "plan": 100e6 + 3 * s["stats"],
        "apply, bias": 100e6 + 3 * s["largest"] + s["stats"],
        "apply, lstsq": 100e6 + solve,
        "apply, sequential": 2 * s["hidden"] + 2 * s["layer"] + working + max(solve, refit),
    }


def measure(folder: Path, config: dict, windows: int, stages: list[str]) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each of the stages, in a folder that is new and left empty."""
    generate(folder / "model", config)
    found = {}
    for name in stages:
        words = [folder / "model" if word == "MODEL" else word for word in STAGES[name]]
        extra = ["--nsamples", windows, "--dtype", "bfloat16"] if words[0] == "calibrate" else []
        found[name] = flap(*words, *extra, "-d", folder / "run")
    shutil.rmtree(folder)
    return found


def check_growth(folder: Path, stages: list[str]) -> None:
    """Print peaks on small layers; exit where more of them, or more windows, take more than the formula says."""
    found = {}
    for layers, windows in ((2, 8), (4, 8), (2, 32)):
        config = SMALL | {"num_hidden_layers": layers}
        found[layers, windows] = measure(folder / "small", config, windows, stages)
    print(f"{'small layers: peak in MB':26} {'2, 8 windows':>14} {'4 layers':>14} {'32 windows':>14}")
    for name in stages:
        peaks = [run[name]["bytes"] / 1e6 for run in found.values()]
        print(f"{name:26} " + " ".join(f"{peak:14,.0f}" for peak in peaks), flush=True)
        more = (formula(SMALL, 32)[name] - formula(SMALL, 8)[name]) / 1e6
        if max(peaks[1], peaks[2] - more) > GROWTH * peaks[0] + 20:
            raise SystemExit(f"{name}: memory grows with layers or windows")


def report(found: dict[str, dict[str, float]], config: dict, windows: int) -> None:
    by_formula = formula(config, windows)
    name = f"one layer, {config['hidden_size']} wide"
    print(f"\n{name:26} {'seconds':>9} {'processor':>9} {'peak':>10} {'formula':>10} {'80 layers':>10}")
    for name, f in found.items():
        print(f"{name:26} {f['seconds']:9.1f} {f['processor']:9.1f} {f['bytes'] / 1e9:7.2f} GB "
              f"{by_formula[name] / 1e9:7.2f} GB {LAYERS * f['processor'] / 3600:8.1f} h")  # fmt: skip


def report_whole() -> None:
    """What all layers need, by the formula."""
    whole = LLAMA_70B | {"num_hidden_layers": LAYERS}
    grams = LAYERS * 4 * (whole["intermediate_size"] ** 2 + whole["hidden_size"] ** 2)
    weights, hidden = (sizes(whole, 128)[kind] for kind in ("weights", "hidden"))
    print(f"80 layers, 128 windows: RAM at most {max(formula(whole, 128).values()) / 1e9:.1f} GB; disk "
          f"{grams / 1e9:.0f} GB of Gram matrices, {(1 - RATIO) * weights / 1e9:.0f} GB pruned, {4 * hidden / 1e9:.1f} "
          "GB of streams")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--divide", type=int, default=1)
    parser.add_argument("--skip-sequential", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where model and runs lie [default: a temporary folder].")
    given = parser.parse_args()
    stages = list(STAGES)[: -1 if given.skip_sequential else None]
    config = divided(ONE, given.divide)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    report_whole()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        check_growth(Path(scratch), stages)
        report(measure(Path(scratch) / "one", config, given.windows, stages), config, given.windows)


if __name__ == "__main__":
    main()
