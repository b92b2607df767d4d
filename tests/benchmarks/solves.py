"""Times of the solves of least squares and elimination over matrix products of as many operations, and their memory.

    python tests/benchmarks/solves.py [--hidden 4096] [--neurons 11008] [--heads 32] [--layers 2] [--repeats 3]

On generated activations and weights of LLaMA-7B's sizes, a fifth of every module pruned. Seconds are those of the
process on a CPU, on one thread, since others may use the machine; the product beside is of square float32 matrices.
Operations are those of the formulas: k³/3 of a Cholesky factor, 2k²o of a solve, 2kpo of a cross term, k²o + p²o of
reported errors (k kept and p pruned channels, o outputs); of elimination n³ for the inverse, n²o for WᵀW, and n³ for
what goes. Peak memory is what the solve takes beside the Gram matrix and the weight it was given, the Gram matrix
counted in, over the size of one.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.resident import begin, peak

from flapcli.calibration.brain_surgeon import eliminate
from flapcli.pruning.compensation import Means, least_squares, refit_on_means
from flapcli.storage.linear_algebra import aligned

PRUNED, AIM = 0.2, 1.5


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.process_time() if not torch.cuda.is_available() else time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.process_time() if not torch.cuda.is_available() else time.perf_counter()) - start


def seconds_of_a_product(operations: float, size: int, device: torch.device) -> float:
    """Of square float32 matrices, that many operations at its rate."""
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    return timed(lambda: left @ right) * operations / (2 * size**3)


def gram_of(channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrix and mean of activations of which few directions have most of the power."""
    made = torch.Generator().manual_seed(0)
    gram, tokens, mean = torch.zeros(channels, channels), 1024, torch.randn(channels, generator=made)
    strong = torch.linspace(0, -3, tokens).exp()
    x = (torch.randn(tokens, channels, generator=made) * strong[:, None]).add_(mean / 8)
    torch.mm(x.T, x, out=gram).div_(tokens).diagonal().add_(0.01)
    return gram.to(device), x.mean(0)


def fit_of(out: int, channels: int, device: torch.device) -> tuple[Any, ...]:
    """What `least_squares` takes."""
    gram, mean = gram_of(channels, device)
    order = torch.randperm(channels)
    pruned, kept = (part.sort().values for part in order.tensor_split([int(PRUNED * channels)]))
    return torch.randn(out, channels) / channels**0.5, kept, pruned, mean, gram, 0.01, True


def show(
    name: str, work: Callable[[], object], operations: float, size: int, device: torch.device, repeats: int
) -> None:
    """One line: seconds, those of a product before and after, their ratio, and peak memory."""
    ratios, seconds, products, resident = [], [], [], []
    for _ in range(repeats):
        product = seconds_of_a_product(operations, min(size, 4096), device)
        on_card = device.type == "cuda"
        torch.cuda.reset_peak_memory_stats() if on_card else None
        before = torch.cuda.memory_allocated() if on_card else begin()
        seconds.append(timed(work))
        resident.append((torch.cuda.max_memory_allocated() if on_card else peak()) - before)
        products.append((product + seconds_of_a_product(operations, min(size, 4096), device)) / 2)
        ratios.append(seconds[-1] / products[-1])
    took, product, ratio = (statistics.median(found) for found in (seconds, products, ratios))
    print(f"{name:26} {operations / 1e9:8,.0f} {took:8.1f} {product:8.1f} {ratio:6.2f} {AIM:5} "
          f"{1 + max(resident) / (4 * size**2):6.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 4096), ("neurons", 11008), ("heads", 32), ("layers", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread"
    print(f"torch {torch.__version__}, {where}")
    print(f"{'':26} {'10^9 op.':>8} {'seconds':>8} {'product':>8} {'ratio':>6} {'aim':>5} {'peak':>6}")
    least_squares(*fit_of(512, 512, device))  # loads what a first call loads
    for layer in range(given.layers):
        for module, n in (("attention", given.hidden), ("mlp", given.neurons)):
            given_to_fit = fit_of(given.hidden, n, device)
            weight, kept, pruned, mean, gram, *_ = given_to_fit
            k, p, out = len(kept), len(pruned), given.hidden
            factor_and_solve = k**3 / 3 + 2 * k * k * out
            work = partial(least_squares, *given_to_fit)
            closed = factor_and_solve + 2 * k * p * out + k * k * out + p * p * out
            show(f"layer {layer}, {module}, lstsq", work, closed, n, device, given.repeats)
            if module == "attention":
                fisher = torch.rand(given.heads)
                work = partial(eliminate, weight, gram, fisher)
                show(f"layer {layer}, elimination", work, 2 * n**3 + n * n * out, n, device, given.repeats)
            rx = aligned(out, k, torch.float32, device).normal_()
            start, r = torch.zeros(out, k), torch.zeros(out, device=device, dtype=torch.float64)
            means = Means(mean[kept].to(device).double(), r, gram[kept][:, kept], rx)
            work = partial(refit_on_means, start, means, 0.3, True)
            show(f"layer {layer}, {module}, refit", work, factor_and_solve, n, device, given.repeats)


if __name__ == "__main__":
    main()
