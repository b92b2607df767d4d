"""Output projections fitted on the activations that the pruned layers before them make, and where they are kept."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flapcli.compensate import Fit, Means, lost, refined
from flapcli.compensation import Compensation, Cut, scatter
from flapcli.errors import FlapError


class Sums:
    """Over tokens, of a module's kept channels x and of what its output owes r: the moments that `refined` reads.

    Products of one batch are float32, as in calibration; sums float64 where the device has it.
    """

    def __init__(self, channels: int, outputs: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.count = 0
        shapes = (channels,), (outputs,), (channels, channels), (channels, outputs)
        self.totals = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]

    def add(self, x: torch.Tensor, r: torch.Tensor) -> None:
        """Take in a batch, float32 (tokens, channels) and (tokens, outputs): whole, or where memory ends not at all."""
        parts = x.sum(0), r.sum(0), x.T @ x, x.T @ r
        for total, part in zip(self.totals, parts, strict=True):
            total.add_(part)
        self.count += len(x)

    def means(self) -> Means:
        """On the CPU."""
        return Means(*(total.cpu().double() / self.count for total in self.totals))


class Refits:
    """Fits in files of a folder until the checkpoint is written: together they may exceed memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: dict[Path, tuple[float | None, float | None, float | None]] = {}

    def put(self, cut: Cut, fit: Fit) -> None:
        path = self._path(cut)
        tensors = {"weight": fit.weight.contiguous()} | ({} if fit.bias is None else {"bias": fit.bias.contiguous()})
        save_file(tensors, path)
        self._told[path] = (fit.before, fit.after, fit.raised)

    def __call__(self, cut: Cut) -> Fit:
        path = self._path(cut)
        found = load_file(path)
        return Fit(found["weight"], found.get("bias"), *self._told[path])

    def _path(self, cut: Cut) -> Path:
        return self.folder / f"{cut.layer}-{cut.module}.safetensors"


class Refit:
    """One module's refit, from its closed form to the projection of `layer` that computes it.

    `weight` and `bias` are the dense projection's as stored, None where it has none; `ridge` that of `refined`.
    """

    def __init__(
        self,
        cut: Cut,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        hidden_size: int,
        compensation: Compensation,
        ridge: float,
        device: torch.device,
    ) -> None:
        self.cut, self.weight, self.bias, self.compensation, self.ridge = cut, weight, bias, compensation, ridge
        start = torch.zeros(hidden_size, 0) if weight is None else compensation.closed(weight, cut).weight
        self.start = start.double()
        self.sums = Sums(len(cut.kept), hidden_size, device)
        self._kept = cut.kept.to(device)
        self._start = start.to(device, torch.float32)
        self._bias = torch.zeros(hidden_size, device=device) if bias is None else bias.to(device, torch.float32)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch of the projection's input (..., channels), and of what it should output (..., out)."""
        x = x.flatten(0, -2).float()[:, self._kept]
        self.sums.add(x, y.flatten(0, -2) - self._bias - x @ self._start.T)

    def fit(self) -> Fit:
        """The fit, which leaves the sums; `before` and `after` are shares of the dense model's own output.

        So they compare with the closed form's, although this fit aims at another target: the dense residual stream,
        given the pruned one. Raises FlapError where activations were not finite.
        """
        means = self.sums.means()
        if not all(torch.isfinite(mean).all() for mean in means):
            raise FlapError(
                f"activations of layer {self.cut.layer}, {self.cut.module} are NaN or infinite once the layers before "
                "are pruned: calibrate with --dtype float32 or bfloat16"
            )
        moved, gain, raised = refined(self.start, means, self.ridge, self.compensation.adds_bias)
        stats, cut = self.compensation.stats, self.cut
        if self.weight is None or stats is None:
            return Fit(moved, gain, raised=raised)
        mean = torch.from_numpy(stats.modules[cut.layer, cut.module].mean)
        gram = self.compensation.gram(cut)
        return Fit(moved, gain, *lost(self.weight, cut.kept, cut.pruned, mean, gram, moved, gain), raised)

    def install(self, projection: torch.nn.Module, fit: Fit, written: torch.dtype, running: torch.dtype) -> None:
        """Let the layer's projection compute the fit, as it is `written`, in `running`; pruned channels meet zeros."""
        if self.weight is not None:
            full = scatter(fit.weight.to(written), self.cut.kept, 1, tuple(self.weight.shape))
            projection.weight = self._parameter(full, running)
        if fit.bias is not None:
            own = 0 if self.bias is None else self.bias.double()
            projection.bias = self._parameter((own + fit.bias).to(written), running)

    def _parameter(self, value: torch.Tensor, running: torch.dtype) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.to(self._bias.device, running), requires_grad=False)
