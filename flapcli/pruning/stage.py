"""Stage 3, `flap apply`: the pruned folder of a plan, or the one that is there already.

Imports torch only to compute.
"""

from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from flapcli import __version__
from flapcli.architecture.family import Family
from flapcli.architecture.flap_section import MadeBy, SourceModel
from flapcli.artifacts.plan import Plan, format_ranges, load_plan
from flapcli.artifacts.plan_of_model import check_belongs
from flapcli.artifacts.pruned_folder import PRUNED, PrunedFolder, check_not_source, is_whole, keeps_old
from flapcli.artifacts.run_dir import hold
from flapcli.artifacts.stats import Stats, load_header, load_stats
from flapcli.checkpoints import Checkpoint, Hub, open_checkpoint
from flapcli.errors import FlapError
from flapcli.execution.processes import is_writer, several_ranks
from flapcli.execution.settings import RIDGES, ApplyOptions, Execution
from flapcli.progress import IMPORTING, Progress, Silent
from flapcli.storage.atomic import atomic_folder
from flapcli.storage.hashing import sha256
from flapcli.storage.resume import discard_all

if TYPE_CHECKING:
    from flapcli.execution.ranks import Ranks
    from flapcli.pruning.compensation import ClosedForm
    from flapcli.pruning.layout import Layout
    from flapcli.pruning.slicing import FitReport

__all__ = ["ApplyInputs", "ApplyOptions", "apply"]


@dataclass(frozen=True)
class ApplyInputs:
    """Where inputs lie if not where the plan says: statistics, the dense model; and how the hub is asked."""

    stats: Path | None = None
    model: str | None = None
    hub: Hub = field(default_factory=Hub)


def apply(
    plan_path: Path,
    out: Path,
    options: ApplyOptions = ApplyOptions(),
    inputs: ApplyInputs = ApplyInputs(),
    execution: Execution = Execution(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[PrunedFolder, bool]:
    """The folder in `out` that the plan's model is pruned into; and whether it was there.

    `execution` is for a sequential fit, which runs the model in the type of the calibration. Where torchrun started
    several processes they share the solves of least squares, and rank 0 writes. Raises UsageError for options that
    don't go together, FlapError for inputs that don't belong together or can't be had.
    """
    options.check()
    with several_ranks(execution.rank_timeout) as ranks, hold(out, ranks.rank if ranks else 0):
        progress = progress if is_writer() else Silent()
        work = _opened(plan_path, out, options, inputs, execution, progress)
        is_current = PRUNED.current(out, work.has_made, force) is not None
        if ranks:  # all do as rank 0, whose folder it is
            is_current = ranks.agree(is_current)[0]
        if not is_current:
            _write_folder(work, keeps_old(out, force, progress), force, progress, ranks)
        if is_writer():
            discard_all(out)  # what runs left that were killed, even between their last two steps
        return PRUNED.load(out), is_current


@dataclass(frozen=True)
class _Work:
    """All that the folder `out` is made from; options are resolved."""

    out: Path
    checkpoint: Checkpoint
    plan: Plan
    plan_path: Path
    stats_path: Path
    options: ApplyOptions
    execution: Execution
    made_by: MadeBy

    def has_made(self, found: PrunedFolder) -> bool:
        """Whether a folder is what would be made, and whole."""
        return found.flap.made_by.same_as(self.made_by) and is_whole(found, self.checkpoint.companions)


def _opened(
    plan_path: Path, out: Path, options: ApplyOptions, inputs: ApplyInputs, execution: Execution, progress: Progress
) -> _Work:
    """Plan and checkpoint, which belong together, and what will be made of them."""
    plan = load_plan(plan_path)
    progress.doing(f"opening {inputs.model or plan.model.name}")
    hub = replace(inputs.hub, revision=inputs.hub.revision or plan.model.revision)
    checkpoint = open_checkpoint(inputs.model or plan.model.name, hub)
    checkpoint.attention_unit = plan.attention_unit
    check_not_source(out, checkpoint.path)
    check_belongs(plan, checkpoint.shape, plan_path)
    options = _resolved(options, plan, checkpoint.family, progress)
    made_by = MadeBy(
        version=__version__,
        model=SourceModel(name=checkpoint.name, revision=hub.revision, fingerprint=checkpoint.fingerprint),
        plan_sha256=sha256(plan_path),
        stats_sha256=plan.stats.sha256,
        companions_sha256=checkpoint.companions_sha256,
        **{key: value for key, value in asdict(options).items() if key != "sequential_by_preset"},
    )
    stats_path = inputs.stats or plan_path.parent / plan.stats.path
    return _Work(out, checkpoint, plan, plan_path, stats_path, options, execution, made_by)


def _resolved(options: ApplyOptions, plan: Plan, family: Family, progress: Progress) -> ApplyOptions:
    """The options with what the plan, the family and the way of fitting decide."""
    if options.sequential_by_preset and not family.fits_sequentially:
        progress.note(f"layers of family {family.name} can't be fitted one after the other: --sequential is left out")
        options = replace(options, sequential=False)
    return replace(
        options,
        compensate=options.compensate or ("bias" if plan.method == "flap" else "none"),
        dtype=options.dtype or (plan.target.dtype if plan.target else None),
        ridge=RIDGES[options.sequential] if options.ridge is None else options.ridge,
    )


def _write_folder(work: _Work, keep_old: bool, force: bool, progress: Progress, ranks: "Ranks | None") -> None:
    stats = _stats_of(work) if work.options.compensate != "none" else None
    made_by = _made_by(work, stats)
    progress.doing(IMPORTING)
    from flapcli.execution.device import float64_device, own_gpu, pick_device
    from flapcli.execution.loading import quiet_transformers
    from flapcli.pruning.companions import write_companions
    from flapcli.pruning.compensation import ClosedForm
    from flapcli.pruning.layout import layout_of
    from flapcli.pruning.slicing import write_tensors

    quiet_transformers()
    options, ridge, fit = work.options, work.options.ridge or 0.0, None
    if options.sequential and stats and is_writer():
        from flapcli.pruning.sequential import SequentialFit  # with all that running a model imports

        fit = SequentialFit(work.checkpoint, stats, work.stats_path, work.execution, ridge)
    kind, ridge = options.compensate or "none", RIDGES[False] if options.sequential else ridge
    device = float64_device(own_gpu(pick_device(work.execution.device)))
    closed_form = ClosedForm(kind, stats, ridge, options.lstsq_bias, device)
    _say_of_rank(stats, kind, progress)
    layout = layout_of(work.checkpoint, work.plan, options, closed_form.adds_bias)
    _say_of_layout(layout, options, progress)
    if ranks:
        closed_form = _shared(closed_form, layout, work, made_by, force, progress, ranks)
    if is_writer():
        fits = fit.stored(fit.resume(work.out, made_by, force), layout, closed_form, progress) if fit else None
        with fits or nullcontext(closed_form) as compensation, atomic_folder(work.out, keep_old) as scratch:
            report = write_tensors(scratch, layout, compensation, options.shard_size, progress)
            _say_of_ridge(report, progress)
            progress.doing("writing configuration, tokenizer and card")
            write_companions(scratch, layout, made_by, report)
    if ranks:
        ranks.agree(None)  # until rank 0 has written all


def _shared(
    closed_form: "ClosedForm", layout: "Layout", work: _Work, made_by: MadeBy, anew: bool, progress: Progress,
    ranks: "Ranks",
) -> "ClosedForm":  # fmt: skip
    """The closed form, with what all ranks solve of it together."""
    from flapcli.pruning.shared_solves import resume_of_solves, solve_by_ranks

    if closed_form.kind != "lstsq":
        progress.note(f"--compensate {closed_form.kind} has nothing to share: rank 0 works alone")
        return closed_form
    facts = made_by.model_dump(mode="json") | {"--device": closed_form.device.type}
    resume = resume_of_solves(work.out, facts, anew, ranks)
    if work.options.sequential:
        progress.note("--sequential: all ranks solve what it starts from, and rank 0 alone goes on from layer to layer")
    return solve_by_ranks(closed_form, layout, resume, ranks, progress)


def _say_of_layout(layout: "Layout", options: ApplyOptions, progress: Progress) -> None:
    """Layers that are dropped or act by biases alone, whether remote code is needed, a target that is missed."""
    layers, count = layout.layers, len(layout.plan.layers)
    kept = layers.source_indices
    if len(kept) < count:
        dropped = format_ranges(sorted(set(range(count)) - set(kept)))
        progress.note(f"layers that keep nothing leave the checkpoint: {dropped}; {len(kept)} of {count} stay")
    if layers.acting:
        progress.note(
            f"layers that keep no unit stay as their biases alone, which go on acting: {format_ranges(layers.acting)}; "
            "--compensate none drops layers whole where the model itself has no biases there"
        )
    if options.remote_code == "auto":
        stock = f"a stock {layout.checkpoint.family.architecture}"
        how = stock if layout.stock else "a checkpoint that needs trust_remote_code"
        progress.note(f"{layout.why}: writing {how}")
    if layout.sliced:
        layer, module = layout.sliced
        progress.note(
            f"layer {layer}, {module} is cut, not masked: else loaders without modeling_flap.py would take the folder "
            "and leave out its biases"
        )
    if (target := layout.plan.target) and (larger := target.overrun(layout.specs)):
        progress.note(larger)


def _say_of_rank(stats: Stats | None, kind: str, progress: Progress) -> None:
    """Fewer tokens than channels: the ridge alone decides what the text does not."""
    if stats and kind == "lstsq":
        widest = max(len(module.mean) for module in stats.modules.values())
        if (tokens := stats.header.calibration.tokens) < widest:
            progress.note(
                f"the Gram matrices come from {tokens:,} tokens, fewer than the widest module's {widest:,} channels, "
                "and are singular: the fit rests on --ridge; more --nsamples would help"
            )


def _say_of_ridge(report: "FitReport", progress: Progress) -> None:
    """Where sums are too coarse for the ridge asked for, a larger one decides more than the text does."""
    if report.raised:
        (layer, module), ridge = max(report.raised.items(), key=lambda item: item[1])
        progress.note(
            f"--ridge grew in {len(report.raised)} modules, to {ridge:g} in layer {layer}, {module}: rounding left "
            "their Gram matrices indefinite; --no-bias, a larger --ridge or float32 (--gram-dtype, --dtype) may fit "
            "better"
        )


def _stats_of(work: _Work) -> Stats:
    """The plan's statistics. Raises FlapError where they are others than those it was made from, or lack something."""
    stats, expected = load_stats(work.stats_path), work.plan.stats.sha256
    if (found := sha256(work.stats_path)) != expected:
        raise FlapError(
            f"{work.plan_path} was made from other statistics ({expected[:12]}) than {work.stats_path} "
            f"({found[:12]}): run `flap plan` again, or give its --stats"
        )
    if work.options.compensate == "lstsq" and not stats.header.settings.get("gram"):
        raise FlapError(f"{work.stats_path} has no Gram matrices, which lstsq needs: run `flap calibrate --gram`")
    return stats


def _made_by(work: _Work, stats: Stats | None) -> MadeBy:
    """What the folder says of itself, with what is not compared with what is asked for."""
    text: dict[str, str | None] = {}
    with suppress(FlapError):  # only a default of `flap eval` depends on it
        read = (stats.header if stats else load_header(work.stats_path)).calibration
        text = {"dataset": read.dataset, "dataset_sha256": read.source_sha256}
    return work.made_by.model_copy(update={"license": work.checkpoint.license} | text)
