"""Which channels of an output projection stay, and by which compensation the others are made up for."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from flapcli.checkpoint.base import Checkpoint
from flapcli.compensate import Fit, least_squares, mean_bias, no_compensation
from flapcli.plan import Plan
from flapcli.presets import adds_bias
from flapcli.shape import Module
from flapcli.stats import Stats


@dataclass(frozen=True)
class Cut:
    """One module of one layer: which channels of its output projection stay, which go."""

    layer: int
    module: Module
    kept_units: torch.Tensor
    kept: torch.Tensor
    pruned: torch.Tensor


@dataclass
class Compensation:
    """How pruned channels are made up for; `errors` and `raised` gather what least squares says of each module.

    `kind` is none, bias or lstsq; all but none read `stats`, lstsq its Gram matrices too. `refits` has the fits
    of lstsq where they are made in another way than the closed form.
    """

    kind: str
    stats: Stats | None = None
    ridge: float = 0.0
    lstsq_bias: bool = True
    errors: dict[tuple[int, Module], tuple[float, float]] = field(default_factory=dict)
    raised: dict[tuple[int, Module], float] = field(default_factory=dict)
    refits: Callable[[Cut], Fit] | None = None

    @property
    def adds_bias(self) -> bool:
        return adds_bias(self.kind, self.lstsq_bias)

    def fit(self, weight: torch.Tensor | None, cut: Cut) -> Fit:
        """The kept columns of an output projection (None: it has no channels) and what its bias gains."""
        fit = self.refits(cut) if self.refits else self.closed(weight, cut)
        if fit.before is not None and fit.after is not None:
            self.errors[cut.layer, cut.module] = (fit.before, fit.after)
        if fit.raised is not None:
            self.raised[cut.layer, cut.module] = fit.raised
        return fit

    def closed(self, weight: torch.Tensor | None, cut: Cut) -> Fit:
        """The fit that needs nothing but the statistics."""
        if weight is None:
            return Fit(torch.zeros(0, 0), None)
        if self.kind == "none" or self.stats is None:
            return no_compensation(weight, cut.kept)
        mean = torch.from_numpy(self.stats.modules[cut.layer, cut.module].mean)
        if self.kind == "bias":
            return mean_bias(weight, cut.kept, cut.pruned, mean)
        return least_squares(weight, cut.kept, cut.pruned, mean, self.gram(cut), self.ridge, self.lstsq_bias)

    def gram(self, cut: Cut) -> torch.Tensor:
        """Mean of x xᵀ of the module's channels, float32 (channels, channels)."""
        if self.stats is None:
            raise ValueError(f"{self.kind} has no Gram matrices")
        return torch.from_numpy(self.stats.gram(cut.layer, cut.module))


def cut_of(checkpoint: Checkpoint, plan: Plan, layer: int, module: Module) -> Cut:
    """What the plan keeps of a module, as channels of its output projection."""
    units = torch.from_numpy(plan.kept(layer, module))
    channels = checkpoint.shape.units(layer, module) * checkpoint.shape.channels_per_unit(module)
    kept = rows_of(units, checkpoint.shape.channels_per_unit(module))
    stays = torch.zeros(channels, dtype=torch.bool)
    stays[kept] = True
    return Cut(layer, module, units, kept, torch.nonzero(~stays).flatten())


def rows_of(units: torch.Tensor, rows_per_unit: int) -> torch.Tensor:
    """Row (or column) indices that belong to units, ascending."""
    return (units[:, None] * rows_per_unit + torch.arange(rows_per_unit)).flatten()


def scatter(values: torch.Tensor, kept: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Kept rows or columns at their old places among zeros."""
    return torch.zeros(shape, dtype=values.dtype).index_copy_(axis, kept, values)
