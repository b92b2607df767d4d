"""The four stages on a GPU, by both presets, on generated checkpoints of LLaMA-7B's and Llama-3-8B's sizes.

    python tests/benchmarks/gpu.py [--models llama-7b,llama-3-8b] [--presets paper,best] [--windows N] [--folder DIR]

Needs no download; of disk what it says first. Weights are random bfloat16, the text is pydoc; `paper` reads 1,024
windows of 128 tokens, and `best` 128 beside what the model writes itself. Every stage is a process of its own. Printed
are its seconds once torch and transformers are imported, what torch held of the GPU's memory at the peak, resident
memory at the peak above that of the imports, and the seconds over those of a bare forward pass of the calibration's
windows, the model in memory already, and over those of reading and writing the checkpoint's bytes with fsync; eval
reads up to 256 windows by both models. Without a GPU it says so and ends; `--device cpu --divide 16 --layers 2
--windows 8` goes through all of it on the CPU, on models a sixteenth as wide.
"""

import argparse
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.generated import LLAMA_3_8B, LLAMA_7B, divided, generate, specs
from support.timed_commands import copy, flap

from flapcli.checkpoints import open_checkpoint
from flapcli.cli.presets import PRESETS
from flapcli.execution.batches import Batches
from flapcli.execution.device import pick_dtype
from flapcli.execution.loading import load_model
from flapcli.execution.memory import give_back
from flapcli.progress import Silent
from flapcli.storage.atomic import require_space
from flapcli.storage.dtypes import dtype_name

MODELS = {"llama-7b": LLAMA_7B, "llama-3-8b": LLAMA_3_8B}
WINDOWS, SEQLEN = {"paper": 1024, "best": 128}, 128
AIMS = {"paper": 120, "best": 300}  # seconds on one H100


class Bare(NamedTuple):
    """Seconds to load the model, and of a window through it; bytes that torch held of the GPU for both."""

    load: float
    window: float
    device: int


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def bare(folder: Path, device: torch.device, windows: int) -> Bare:
    """The model by transformers, in calibrate's own type and batches."""
    transformers.LlamaForCausalLM  # noqa: B018  imported before the time runs
    checkpoint, began = open_checkpoint(str(folder)), now(device)
    model = load_model(checkpoint, pick_dtype("auto", device), device)
    loaded = now(device)
    ids = torch.randint(checkpoint.vocabulary, (windows, SEQLEN), device=device)
    batches = Batches(SEQLEN, device, None, Silent())

    def run(count: int) -> None:
        batches.run(count, lambda part: model.model(input_ids=ids[part], use_cache=False))

    run(min(batches.size, windows))  # warms up
    warm = now(device)
    run(windows)
    took = now(device) - warm
    held = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return Bare(loaded - began, took / windows, held)


def copied(folder: Path) -> float:
    """Seconds to read and write the weights."""
    took = copy(folder, folder.with_name("copy"))
    shutil.rmtree(folder.with_name("copy"))
    return took


def disk(config: dict, presets: list[str]) -> int:
    """Bytes at the most: weights and a copy, or pruned; by `best` Gram matrices, and their sums while it calibrates."""
    weights = sum(spec.nbytes for spec in specs(config))
    widths = config["num_attention_heads"] * config["head_dim"], config["intermediate_size"]
    grams = config["num_hidden_layers"] * sum(4 * width**2 for width in widths) if "best" in presets else 0
    return weights + max(2 * grams, grams + 6 * weights // 5)


def measure(folder: Path, preset: str, windows: int, device: torch.device, window: float, copying: float) -> None:
    """One preset's table, beside seconds of a window through the model and of copying its weights."""
    read, run, whole = PRESETS[preset].text(None, "pydoc", windows)[1], folder.with_name(preset), 0.0
    text, where = ["--seqlen", SEQLEN], ["--device", device]
    commands: dict[str, list[object]] = {
        "calibrate": [folder, "--dataset", "pydoc", "--nsamples", windows, "--preset", preset, *text, *where],
        "plan": ["--preset", preset],
        "apply": ["--preset", preset, *where],
        "eval": [*text, *where],
    }
    title = f"{preset}, {read:,} windows"
    print(f"\n{title:20} {'seconds':>9} {'GPU':>10} {'RAM':>10} {'/ forward':>10} {'/ copy':>8}")
    for name, options in commands.items():
        found = flap(name, *options, "-d", run)
        whole += found["whole"]
        seconds = found["seconds"]
        print(f"{name:20} {seconds:9.1f} {found['device'] / 1e9:7.2f} GB {found['bytes'] / 1e9:7.2f} GB "
              f"{seconds / (read * window):10.1f} {seconds / copying:8.1f}", flush=True)  # fmt: skip
    print(f"all four processes with their imports: {whole:.0f} s (aim on one H100, undivided: {AIMS[preset]} s)")
    shutil.rmtree(run)


def device_of(name: str) -> torch.device:
    if name == "auto" and not torch.cuda.is_available():
        print("no GPU here, nothing measured: --device cpu --divide 16 --layers 2 --windows 8 runs this on the CPU")
        sys.exit()
    return torch.device("cuda" if name == "auto" else name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--presets", default=",".join(WINDOWS))
    parser.add_argument("--windows", type=int, help="Of both presets, in the place of 1,024 and 128.")
    parser.add_argument("--divide", type=int, default=1, help="Divide all widths.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="Where models and runs lie [default: a temporary folder].")
    given = parser.parse_args()
    device, presets = device_of(given.device), given.presets.split(",")
    windows = {preset: given.windows or WINDOWS[preset] for preset in presets}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, {dtype_name(pick_dtype('auto', device))}")  # fmt: skip
    for name in given.models.split(","):
        config = divided(MODELS[name], given.divide) | {"num_hidden_layers": given.layers}
        with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
            needed = disk(config, presets)
            print(f"\n{name}, {given.layers} layers, {config['hidden_size']} wide: {needed / 1e9:.1f} GB of disk")
            require_space(Path(scratch), needed)
            folder = Path(scratch, "model")
            generate(folder, config, device)
            most, copying = max(windows.values()), copied(folder)
            found = bare(folder, device, most)
            give_back()
            print(f"loading {found.load:.1f} s; a forward pass of {most:,} windows {found.window * most:.1f} s, "
                  f"{found.device / 1e9:.2f} GB of the GPU; copying {copying:.1f} s", flush=True)  # fmt: skip
            for preset in presets:
                measure(folder, preset, windows[preset], device, found.window, copying)


if __name__ == "__main__":
    main()
