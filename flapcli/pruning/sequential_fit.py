"""Output projections fitted on the activations that the pruned layers before them make, and where fits are kept."""

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flapcli.checkpoints import Checkpoint
from flapcli.errors import FlapError
from flapcli.execution.device import sums_dtype
from flapcli.pruning.compensation import ClosedForm, Fit, Means, refit_errors, refit_on_means
from flapcli.pruning.covariance import Centred
from flapcli.pruning.cut import ModuleCut, read_output, scatter
from flapcli.storage.atomic import atomic_file
from flapcli.storage.linear_algebra import aligned


class CannotFitError(FlapError):
    """Another try would end the same."""


class StoredFits:
    """Fits in files of a folder until the checkpoint is written: together they may exceed memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, cut: ModuleCut, fit: Fit) -> None:
        tensors = {"weight": fit.weight.contiguous()} | ({} if fit.bias is None else {"bias": fit.bias.contiguous()})
        told = [fit.before, fit.after, fit.raised, fit.whole, fit.added]
        with atomic_file(self._path(cut)) as scratch:
            save_file(tensors, scratch, {"told": json.dumps(told)})

    def holds(self, cut: ModuleCut) -> bool:
        return self._path(cut).exists()

    def fit(self, _weight: torch.Tensor, cut: ModuleCut) -> Fit:
        with safe_open(self._path(cut), "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
            return Fit(found["weight"], found.get("bias"), *json.loads(file.metadata()["told"]))

    def put_factor(self, names: list[str], factor: float) -> None:
        """These tensors, which are not cut, are written times this."""
        with atomic_file(self._factors_path) as scratch:
            scratch.write_text(json.dumps(dict.fromkeys(names, factor)), encoding="utf-8")

    def copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() * self._factors[name] if name in self._factors else tensor

    @cached_property
    def _factors(self) -> dict[str, float]:
        """What `put_factor` kept, read once: all is fitted before the first tensor is written."""
        return json.loads(self._factors_path.read_bytes()) if self._factors_path.exists() else {}

    @property
    def _factors_path(self) -> Path:
        return self.folder / "factors.json"

    def _path(self, cut: ModuleCut) -> Path:
        return self.folder / f"{cut.layer}-{cut.module}.safetensors"


class ProjectionFit:
    """One output projection's sequential fit, which starts at its closed form; `ridge` is that of `refit_on_means`.

    Sums over tokens are float64 where the device has it, those of products float32, as in calibration.
    """

    def __init__(
        self, cut: ModuleCut, checkpoint: Checkpoint, closed_form: ClosedForm, ridge: float, device: torch.device
    ) -> None:
        self.cut, self.closed_form, self.ridge = cut, closed_form, ridge
        self.weight, self.bias = read_output(checkpoint, cut)
        channels, outputs = len(cut.kept), checkpoint.shape.hidden_size
        self.start = closed_form.fit(self.weight, cut)
        own = torch.zeros(outputs) if self.bias is None else self.bias
        self._kept = cut.kept.to(device)
        self._start, self._bias = self.start.weight.to(device, torch.float32), own.to(device, torch.float32)
        self._sums = Means(
            *(torch.zeros(size, device=device, dtype=sums_dtype(device)) for size in (channels, outputs)),
            *(aligned(size, channels, torch.float32, device).zero_() for size in (channels, outputs)),
        )
        self._tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in a batch of the projection's input (..., channels), and of what it should output (..., out).

        Whole, or where memory ends not at all.
        """
        x = x.flatten(0, -2).float()[:, self._kept]
        r = y.flatten(0, -2) - self._bias - x @ self._start.T
        of_x, of_r = x.sum(0), r.sum(0)
        self._sums.x.add_(of_x)
        self._sums.r.add_(of_r)
        self._sums.xx.addmm_(x.T, x)
        self._sums.rx.addmm_(r.T, x)
        self._tokens += len(x)

    def fit(self) -> Fit:
        """The fit, which takes the sums' memory; `before` and `after` are shares of the dense model's own output.

        So they compare with the closed form's, although this fit aims at another target: the dense residual stream,
        given the pruned one. Raises FlapError where activations were not finite.
        """
        means = Means(*(total.div_(self._tokens).to(self.closed_form.device) for total in self._sums))
        if not all(torch.isfinite(mean).all() for mean in means):
            raise CannotFitError(
                f"activations of layer {self.cut.layer}, {self.cut.module} are NaN or infinite once the layers before "
                "are pruned: calibrate with --dtype float32 or bfloat16"
            )
        moved, gain, raised = refit_on_means(self.start.weight, means, self.ridge, self.closed_form.adds_bias)
        del means, self._sums
        cut = self.cut
        gram = self.closed_form.gram(cut)
        stats = Centred(gram, self.closed_form.mean(cut).to(gram.device, sums_dtype(gram.device)))
        errors = refit_errors(self.weight, cut.kept, stats, self.start, moved, gain)
        return Fit(moved, gain, *errors, raised)

    def install(self, projection: torch.nn.Module, fit: Fit, written: torch.dtype, running: torch.dtype) -> None:
        """Let the layer's projection compute the fit, as it is `written`, in `running`; pruned channels meet zeros."""
        full = scatter(fit.weight.to(written), self.cut.kept, 1, tuple(self.weight.shape))
        full = full if projection.weight.shape == full.shape else full.T
        projection.weight = self._parameter(full, running)
        if fit.bias is not None:
            own = 0 if self.bias is None else self.bias.double()
            projection.bias = self._parameter((own + fit.bias).to(written), running)

    def _parameter(self, value: torch.Tensor, running: torch.dtype) -> torch.nn.Parameter:
        return torch.nn.Parameter(value.to(self._bias.device, running), requires_grad=False)
