"""`flap apply`: the pruned folder of a plan, or the one that is there already."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flapcli import __version__
from flapcli.checkpoint import Checkpoint, Hub, open_checkpoint
from flapcli.checkpoint.write import parse_size
from flapcli.errors import FlapError, UsageError, only_with
from flapcli.pipeline.common import Compute
from flapcli.plan import Plan, check_belongs, format_ranges, load_plan, pruned_layers
from flapcli.progress import Progress
from flapcli.rundir import atomic_folder, sha256
from flapcli.shape import Module
from flapcli.stats import Stats, load_header, load_stats
from flapcli.target import exceeded, recorded

if TYPE_CHECKING:
    from flapcli.dropped import Depth
    from flapcli.pipeline.refitting import Fitting

# Default of --ridge by whether the fit is sequential: it acts on the fit of all projections together (METHOD.md), or
# on what every projection in turn may move from there, measured on SmolLM2 among 0.1 to 0.3.
RIDGES = {False: 0.01, True: 0.3}


@dataclass(frozen=True)
class ApplyOptions:
    """How a plan is applied; None leaves the choice to the plan: its method, its target's dtype, else the source's."""

    compensate: str | None = None
    ridge: float | None = None
    lstsq_bias: bool = True
    mask_only: bool = False
    remote_code: str = "auto"
    dtype: str | None = None
    max_shard_size: str = "5GB"
    sequential: bool = False

    def check(self) -> None:
        """Raise UsageError for options that don't go together."""
        if self.ridge is not None and not 0 <= self.ridge < math.inf:
            raise UsageError(f"--ridge {self.ridge}: must be a number of at least 0")
        own = {"--sequential": self.sequential, "--ridge": self.ridge is not None, "--no-bias": not self.lstsq_bias}
        only_with("--compensate lstsq", self.compensate == "lstsq", own)
        self.shard_size  # noqa: B018  refuses what is no size

    @property
    def shard_size(self) -> int:
        """Bytes of a file of weights at most."""
        return parse_size(self.max_shard_size, "--max-shard-size")

    def resolved(self, plan: Plan) -> "ApplyOptions":
        """The options with what the plan and the way of fitting decide; RIDGES says where --ridge then acts."""
        target = recorded(plan.settings)
        return replace(
            self,
            compensate=self.compensate or ("bias" if plan.method == "flap" else "none"),
            dtype=self.dtype or (target.dtype if target else None),
            ridge=RIDGES[self.sequential] if self.ridge is None else self.ridge,
        )


def run_apply(
    out: Path,
    plan_path: Path,
    stats_path: Path | None,
    model: str | None,
    hub: Hub,
    options: ApplyOptions,
    force: bool,
    progress: Progress,
    compute: Compute | None = None,
) -> tuple[dict[str, Any], bool]:
    """Stage 3: the pruned folder in `out`. Returns its config.json. `compute` is for a sequential fit."""
    options.check()
    plan = load_plan(plan_path)
    options = options.resolved(plan)
    compensate = options.compensate
    stats_path = stats_path or plan_path.parent / plan.stats.path
    hub = Hub(hub.revision or plan.model.revision, hub.cache_dir, hub.trust_remote_code)
    checkpoint = open_checkpoint(model or plan.model.name, hub)
    check_belongs(plan, checkpoint.shape, plan_path)
    made_by = {
        "version": __version__,
        "model": {"name": checkpoint.name, "revision": hub.revision, "fingerprint": checkpoint.fingerprint},
        "plan_sha256": sha256(plan_path),
        "stats_sha256": plan.stats.sha256,
        **asdict(options),
    }
    found = existing_folder(out)
    if found and not force and _same_apply(found["flap"].get("made_by", {}), made_by):
        return found, True
    stats = _stats_of(plan, plan_path, stats_path) if compensate != "none" else None
    if stats and compensate == "lstsq" and not stats.header.settings.get("gram"):
        raise FlapError(f"{stats_path} has no Gram matrices, which lstsq needs: run `flap calibrate --gram`")
    made_by["license"] = checkpoint.license
    made_by["dataset"] = stats.header.calibration.dataset if stats else _dataset_of(stats_path)
    fitting = _fitting(checkpoint, stats, stats_path, compute or Compute()) if options.sequential else None
    _write_folder(out, checkpoint, plan, stats, options, made_by, progress, fitting)
    return json.loads((out / "config.json").read_bytes()), False


def _write_folder(
    out: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    stats: Stats | None,
    options: ApplyOptions,
    made_by: dict[str, Any],
    progress: Progress,
    fitting: "Fitting | None",
) -> None:
    from flapcli.apply import jobs, write, zeros
    from flapcli.compensation import Compensation
    from flapcli.device import TORCH_DTYPES, dtype_name
    from flapcli.dropped import depth_of, renumbered
    from flapcli.folder import write_companions
    from flapcli.loading import quiet_transformers
    from flapcli.stock import as_stock

    quiet_transformers()
    ridge: float = made_by["ridge"]
    compensation = Compensation(made_by["compensate"], stats, RIDGES[False] if fitting else ridge, options.lstsq_bias)
    _say_of_rank(stats, made_by["compensate"], progress)
    work = jobs(checkpoint, plan, compensation, options.mask_only, options.dtype)
    depth = depth_of(checkpoint, plan, compensation.adds_bias, options.mask_only)
    _say_of_depth(depth, len(plan.layers), progress)
    work = renumbered(work, checkpoint, depth)
    code = next(spec.dtype for job in work for spec in job.outputs if len(spec.shape) == 2)
    sizes = checkpoint.shape.layers if options.mask_only else pruned_layers(plan, checkpoint.shape)
    layers = tuple(sizes[i] for i in depth.stay)
    stock = None
    if options.remote_code == "auto":
        stock, why = as_stock(checkpoint, layers, depth, compensation.adds_bias, code)
        how = f"a stock {checkpoint.family.architecture}" if stock else "a checkpoint that needs trust_remote_code"
        progress.note(f"{why}: writing {how}")
    work += zeros(stock.zero_biases if stock else [])
    if larger := exceeded(plan.settings, [spec for job in work for spec in job.outputs]):
        progress.note(larger)
    with atomic_folder(out) as scratch, TemporaryDirectory(dir=scratch) as fits:
        if fitting:
            compensation.refits = fitting.run(
                Path(fits), plan, compensation, ridge, options.dtype, depth.stay, progress,
                sum(spec.nbytes for job in work for spec in job.outputs),
            )  # fmt: skip
        write(scratch, work, options.shard_size, progress)
        _say_of_ridge(compensation.raised, progress)
        dtype = dtype_name(TORCH_DTYPES[code])
        write_companions(scratch, checkpoint, plan, made_by, layers, depth, dtype, compensation, stock)


def _say_of_depth(depth: "Depth", count: int, progress: Progress) -> None:
    if len(depth.stay) < count:
        gone = format_ranges(sorted(set(range(count)) - set(depth.stay)))
        progress.note(f"layers that keep nothing leave the checkpoint: {gone}; {len(depth.stay)} of {count} stay")
    if depth.acting:
        progress.note(
            f"layers that keep no unit stay as their biases alone, which go on acting: {format_ranges(depth.acting)}; "
            "--compensate none drops layers whole where the model itself has no biases there"
        )


def _say_of_rank(stats: Stats | None, compensate: str, progress: Progress) -> None:
    """Fewer tokens than channels: the ridge alone decides what the text does not."""
    if stats and compensate == "lstsq":
        widest = max(len(module.mean) for module in stats.modules.values())
        if (tokens := stats.header.calibration.tokens) < widest:
            progress.note(
                f"the Gram matrices come from {tokens:,} tokens, fewer than the widest module's {widest:,} channels, "
                "and are singular: the fit rests on --ridge; more --nsamples would help"
            )


def _say_of_ridge(raised: dict[tuple[int, Module], float], progress: Progress) -> None:
    """Where sums are too coarse for the ridge asked for, a larger one decides more than the text does."""
    if raised:
        (layer, module), ridge = max(raised.items(), key=lambda item: item[1])
        progress.note(
            f"--ridge grew in {len(raised)} modules, to {ridge:g} in layer {layer}, {module}: rounding left their "
            "Gram matrices indefinite; --no-bias, a larger --ridge or float32 (--gram-dtype, --dtype) may fit better"
        )


def _fitting(checkpoint: Checkpoint, stats: Stats | None, stats_path: Path, compute: Compute) -> "Fitting | None":
    from flapcli.pipeline.refitting import Fitting

    return Fitting.of(checkpoint, stats, stats_path, compute) if stats else None


def _same_apply(found: dict[str, Any], asked: dict[str, Any]) -> bool:
    found = {"sequential": False} | found  # folders from before there was a choice
    keys = asked.keys() - {"version"}
    return all(found.get(key) == asked[key] for key in keys)


def _stats_of(plan: Plan, plan_path: Path, stats_path: Path) -> Stats:
    """The plan's statistics. Raises FlapError where they are others than those it was made from."""
    stats = load_stats(stats_path)
    if (found := sha256(stats_path)) != plan.stats.sha256:
        raise FlapError(
            f"{plan_path} was made from other statistics ({plan.stats.sha256[:12]}) than {stats_path} "
            f"({found[:12]}): run `flap plan` again, or give its --stats"
        )
    return stats


def _dataset_of(stats_path: Path) -> str | None:
    try:
        return load_header(stats_path).calibration.dataset
    except FlapError:
        return None  # only a default of `flap eval` depends on it


def existing_folder(out: Path) -> dict[str, Any] | None:
    """config.json of a pruned folder at `out`, None where nothing is there; refuses anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        config = json.loads((out / "config.json").read_bytes())
        if "made_by" in config["flap"]:
            return config
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FlapError(f"{out} holds something that flap did not write: move it away or give another --out")
