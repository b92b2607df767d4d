"""Times of calibrate, plan, apply, a whole run and `flap --help`, each as a ratio to a baseline in the same run.

    python tests/benchmarks/speed.py [--windows 1024]

On SmolLM2 (the demo) and pydoc. The authors' way is written anew here from their description: float32, one
window at a time, layer by layer, hooks on both output projections that update a running mean and variance.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Torch is imported inside: a child's peak memory counts from its parent's at the fork.


class AuthorsHook:
    """The running moments of the authors' WrappedGPT.add_batch, channel by token as they keep them."""

    def __init__(self, channels: int) -> None:
        import torch

        self.baseline, self.fluctuation, self.nsamples = torch.zeros(channels), torch.zeros(channels), 0

    def __call__(self, _module, inputs, _output) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).t()
        old = self.baseline
        self.baseline = self.baseline * (self.nsamples / (self.nsamples + 1)) + x.mean(1) / (self.nsamples + 1)
        if self.nsamples:
            self.fluctuation *= (self.nsamples - 1) / self.nsamples
            product = (x - self.baseline.unsqueeze(1)) * (x - old.unsqueeze(1))
            self.fluctuation += product.sum(1) / (self.nsamples + 1)
        self.nsamples += 1


def authors_way(nsamples: int) -> float:
    """Seconds from a GGUF file to the statistics, loading included, as their script goes about it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flapcli.checkpoints import open_checkpoint
    from flapcli.texts.corpus import calibration_windows

    start = time.perf_counter()
    path = open_checkpoint("demo").path
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    windows = torch.from_numpy(calibration_windows("pydoc", tokenizer, nsamples, 128, 0))
    decoder = model.model
    with torch.no_grad():
        hidden = [decoder.embed_tokens(window[None]) for window in windows]
        places = torch.arange(128)[None]
        rotary = decoder.rotary_emb(hidden[0], places)
        mask = torch.full((128, 128), float("-inf")).triu(1)[None, None]
        for layer in decoder.layers:
            projections = (layer.self_attn.o_proj, layer.mlp.down_proj)
            handles = [p.register_forward_hook(AuthorsHook(p.in_features)) for p in projections]
            for i, states in enumerate(hidden):
                hidden[i] = layer(states, attention_mask=mask, position_embeddings=rotary, position_ids=places)
            for handle in handles:
                handle.remove()
    return time.perf_counter() - start


def run(*args: str) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a whole process."""
    before = time.perf_counter()
    usage = finished(*args)
    return time.perf_counter() - before, usage.ru_maxrss * 1024


def cpu(*args: str) -> float:
    """Seconds of CPU of a whole process, which other load on the machine changes little."""
    usage = finished(*args)
    return usage.ru_utime + usage.ru_stime


def finished(*args: str):
    """What a process used, which must succeed."""
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{args} failed")
    return usage


def hooks_over_bare_forward(batches: int = 24) -> None:
    """Alternate batches without the recorder, with it, and with Gram products, on the same decoder and tokens."""
    import torch

    from flapcli.calibration.recorder import Recorder
    from flapcli.checkpoints import open_checkpoint
    from flapcli.execution.device import pick_dtype
    from flapcli.execution.loading import load_model
    from flapcli.texts.corpus import calibration_windows

    cpu = torch.device("cpu")
    source = open_checkpoint("demo")
    windows = torch.from_numpy(calibration_windows("pydoc", source.load_tokenizer(), 8 * batches, 128, 0))
    dtype = pick_dtype("auto", cpu)
    models = {name: load_model(source, dtype, cpu) for name in ("bare", "hooked", "gram")}
    recorders = {name: Recorder(source, models[name], name == "gram", cpu) for name in ("hooked", "gram")}
    shape = source.shape
    inputs = [torch.randn(8 * 128, shape.channels(i, m)) for i in range(shape.num_layers) for m in shape.modules]
    sums = [x.T @ x for x in inputs]

    def products() -> None:
        for x, total in zip(inputs, sums, strict=True):
            total.addmm_(x.T, x)

    def forward(name: str, index: int) -> None:
        if recorder := recorders.get(name):
            recorder.begin(slice(8 * index, 8 * index + 8))
        models[name].model(input_ids=windows[8 * index : 8 * index + 8], use_cache=False)
        if recorder:
            recorder.commit()

    times: dict[str, list[float]] = {name: [] for name in (*models, "products")}
    with torch.inference_mode():
        for index in range(batches):
            for name, taken in times.items():
                start = time.process_time()
                products() if name == "products" else forward(name, index)
                taken.append(time.process_time() - start)
    bare, hooked, gram, alone = times.values()
    hooks = statistics.median(h / b for h, b in zip(hooked, bare, strict=True))
    more = statistics.median((g - h) / p for g, h, p in zip(gram, hooked, alone, strict=True))
    print(f"calibrate over a bare forward pass of the decoder ({dtype}, batches of 8 x 128): {hooks:.3f} of its CPU "
          f"time (median of {batches}; aim at most 1.10)")  # fmt: skip
    print(f"--gram on top: {more:.3f} of the CPU time of its products alone (float32; aim at most 1)")


def whole_pipeline(nsamples: int, folder: Path) -> float:
    """Seconds of calibrate + plan + apply as a user gets them by default."""
    flap = ("-m", "flapcli")
    total = 0.0
    for stage, options in (("calibrate", ["--nsamples", str(nsamples)]), ("plan", []), ("apply", [])):
        seconds, peak = run(*flap, stage, "-d", str(folder), *options)
        total += seconds
        print(f"flap {stage}: {seconds:.2f} s, peak {peak / 1e6:.0f} MB", flush=True)
    return total


def apply_over_copy(scratch: Path) -> None:
    """apply on a safetensors checkpoint (the pruned demo, dtype kept) over copying its weights."""
    folder = scratch / "run"
    dense = folder / "pruned"
    again = str(scratch / "again")
    run("-m", "flapcli", "calibrate", str(dense), "-d", again, "--nsamples", "8", "--dataset", "pydoc")
    run("-m", "flapcli", "plan", "-d", again, "--ratio", "0")
    seconds, peak = run("-m", "flapcli", "apply", "-d", again)
    imports, floor = run("-c", "import torch, transformers")
    weights = next(dense.glob("*.safetensors"))
    start = time.perf_counter()
    shutil.copyfile(weights, scratch / "copy")
    with (scratch / "copy").open("rb+") as file:
        os.fsync(file.fileno())
    copied = time.perf_counter() - start
    print(f"apply of {weights.stat().st_size / 1e6:.0f} MB: {seconds:.2f} s, {seconds - imports:.2f} s after imports "
          f"= {(seconds - imports) / copied:.2f} of copying the file with fsync ({copied:.2f} s)")  # fmt: skip
    print(f"apply's peak over that of importing torch and transformers: {peak / 1e6:.0f} MB / {floor / 1e6:.0f} MB "
          f"= {peak / floor:.2f}")  # fmt: skip


BARE = """
import sys
import torch
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.device import pick_dtype
from flapcli.execution.loading import load_model, quiet_transformers
quiet_transformers()
cpu, windows, source = torch.device("cpu"), int(sys.argv[1]), open_checkpoint("demo")
calibrated, read = (load_model(source, dtype, cpu) for dtype in (pick_dtype("auto", cpu), torch.float32))
with torch.inference_mode():
    for count, model in ((windows, calibrated.model), (60, read), (60, read)):  # eval reads dense and pruned
        for start in range(0, count, 8):
            model(input_ids=torch.arange(128).expand(min(8, count - start), 128), use_cache=False)
torch.save(read.state_dict(), sys.argv[2])
"""


def run_over_its_parts(windows: int, folder: Path, rounds: int = 3) -> None:
    """`flap run` over a process that imports, loads and runs the model as often and writes it, in turns; CPU time."""
    ratios = []
    for turn in range(rounds):
        place = str(folder / f"run{turn}")
        whole = cpu("-m", "flapcli", "run", "-d", place, "--preset", "paper", "--nsamples", str(windows))
        ratios.append(whole / cpu("-c", BARE, str(windows), str(folder / "written")))
    print(f"flap run ({windows} windows) over its imports, loading, bare forward passes and a write: "
          f"{statistics.median(ratios):.2f} of the CPU time (median of {rounds}; aim at most 1.3)")  # fmt: skip


def start_up() -> None:
    bare, help_ = (
        statistics.median(run(*args)[0] for _ in range(7)) for args in (("-c", "pass"), ("-m", "flapcli", "--help"))
    )
    print(f"flap --help: {help_:.3f} s = {help_ / bare:.1f} of python -c pass (aim under 0.5 s)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=1024)
    options = parser.parse_args()
    start_up()
    with tempfile.TemporaryDirectory() as scratch:
        ours = whole_pipeline(options.windows, Path(scratch) / "run")
        apply_over_copy(Path(scratch))
        run_over_its_parts(options.windows, Path(scratch))
    from flapcli.execution.loading import quiet_transformers

    quiet_transformers()
    hooks_over_bare_forward()
    theirs = authors_way(options.windows)
    print(f"authors' way over calibrate + plan + apply ({options.windows} windows, loading included): "
          f"{theirs:.1f} s / {ours:.1f} s = {theirs / ours:.2f} (aim at least 4)")  # fmt: skip


if __name__ == "__main__":
    main()
