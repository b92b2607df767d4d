"""Memory and time of calibrate and apply on a generated bfloat16 Llama of TinyLlama-1.1B's sizes.

    python tests/benchmarks/memory.py [--nsamples 128] [--skip-in-memory] [--folder DIR]

Prints peak resident memory above the import of torch and transformers, the time of streamed calibration over
that of the in-memory one, the time of `flap apply` over copying the checkpoint's bytes with fsync, and what a
model of Llama-2-70B's sizes would need by the same formulas. About 10 minutes on 2 cores.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.generated import LLAMA_70B, TINYLLAMA, generate, specs
from support.timed_commands import copy, flap

SEQLEN, BATCH_TOKENS = 128, 1024
LIBRARIES = 100e6  # what commands load besides torch and transformers


def sizes(config: dict, nsamples: int) -> dict[str, float]:
    """Bytes that the stages work with."""
    tensors = specs(config)
    channels = config["num_attention_heads"] * config["head_dim"] + config["intermediate_size"]
    return {
        "weights": sum(s.nbytes for s in tensors),
        "layer": sum(s.nbytes for s in tensors if ".layers.0." in s.name),
        "outputs": sum(s.nbytes for s in tensors if "o_proj" in s.name or "down_proj" in s.name),
        "largest": max(s.nbytes for s in tensors),
        "embedding": tensors[0].nbytes,
        "hidden": nsamples * SEQLEN * config["hidden_size"] * 2,
        "batch": BATCH_TOKENS * config["intermediate_size"] * 4,
        "stats": config["num_hidden_layers"] * channels * 5 * 4,
    }


def formula(s: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """RAM, disk and bytes read of every stage.

    A streamed layer stands beside the next one; a batch has about four activations of the MLP's width in float32.
    """
    working = 4 * s["batch"] + LIBRARIES
    streamed = s["hidden"] + max(2 * s["layer"], s["embedding"]) + working
    return {
        "calibrate --stream": (streamed, 2 * s["hidden"] + s["stats"], s["weights"]),
        "calibrate in memory": (s["weights"] + working, s["stats"], s["weights"]),
        "plan": (3 * s["stats"], 0, s["stats"]),
        "apply": (2 * s["largest"] + s["stats"], s["weights"], s["weights"] + s["outputs"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--skip-in-memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where model and runs lie [default: a temporary folder].")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        measure(Path(scratch), options.nsamples, options.skip_in_memory)


def measure(scratch: Path, nsamples: int, skip: bool) -> None:
    model = scratch / "model"
    generate(model, TINYLLAMA)
    text = ["--dataset", "pydoc", "--nsamples", nsamples, "--seqlen", SEQLEN, "--dtype", "bfloat16"]
    by_formula = formula(sizes(TINYLLAMA, nsamples))
    stages = {"calibrate --stream": "--stream"} | ({} if skip else {"calibrate in memory": "--no-stream"})
    print(f"{nsamples} windows of {SEQLEN} tokens, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    found = {}
    for name, mode in stages.items():
        found[name] = flap("calibrate", model, "-d", scratch / mode, *text, mode)
    found["plan"] = flap("plan", "-d", scratch / "--stream")
    copied = copy(model, scratch / "copy")
    found["apply"] = flap("apply", "-d", scratch / "--stream")
    again = copy(model, scratch / "copy2")
    print(f"{'':22} {'peak above imports':>20} {'by formula':>12} {'seconds':>9}")
    for name, f in found.items():
        print(f"{name:22} {f['bytes'] / 1e6:17,.0f} MB {by_formula[name][0] / 1e6:9,.0f} MB {f['seconds']:9.1f}")
    if not skip:
        ratio = found["calibrate --stream"]["seconds"] / found["calibrate in memory"]["seconds"]
        print(f"streamed over in-memory time: {ratio:.2f}")
    seconds = (copied + again) / 2
    print(f"apply over copying with fsync ({copied:.1f} s before, {again:.1f} s after): "
          f"{found['apply']['seconds'] / seconds:.2f}")  # fmt: skip
    print(f"\nLlama-2-70B, bfloat16, 1024 windows of {SEQLEN} tokens, by the same formulas")
    print(f"{'':22} {'RAM':>12} {'disk':>12} {'bytes read':>12}")
    for name, values in formula(sizes(LLAMA_70B, 1024)).items():
        print(f"{name:22} " + " ".join(f"{value / 1e9:9.2f} GB" for value in values))


if __name__ == "__main__":
    main()
