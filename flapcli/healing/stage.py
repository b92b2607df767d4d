"""The optional stage after apply, `flap heal`: a pruned folder trained to answer like the dense model.

Imports torch only to compute.
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from flapcli.architecture.flap_section import FlapSection
from flapcli.artifacts.dense_model import dense_of
from flapcli.artifacts.pruned_folder import PRUNED, PrunedFolder, check_not_source, is_whole, keeps_old, load_pruned
from flapcli.artifacts.run_dir import RunDir, hold
from flapcli.checkpoints import Checkpoint, Hub, open_checkpoint
from flapcli.errors import FlapError, UsageError
from flapcli.execution.processes import several_ranks
from flapcli.execution.settings import Execution, HealOptions
from flapcli.healing.healing_request import HealingRequest
from flapcli.progress import IMPORTING, Progress, Silent
from flapcli.texts.corpus import default_text
from flapcli.texts.mixture import SELF, Mixture, combined

TOKENS = 1_000_000  # default of --tokens

__all__ = ["HealInputs", "HealOptions", "heal"]


@dataclass(frozen=True)
class HealInputs:
    """The dense model, if it lies elsewhere by now; how the hub is asked; where the teacher's answers are kept."""

    model: str | None = None
    hub: Hub = field(default_factory=Hub)
    teacher: Path | None = None


def heal(
    checkpoint: Path,
    out: Path,
    options: HealOptions = HealOptions(),
    inputs: HealInputs = HealInputs(),
    execution: Execution = Execution(),
    force: bool = False,
    progress: Progress = Silent(),
) -> tuple[PrunedFolder | None, bool]:
    """The folder in `out` that the pruned one at `checkpoint` is healed into, and whether it was there.

    None where training did not make it better on held-out windows: then nothing is written. Rank 0 writes where
    torchrun started several. Raises UsageError for options that don't go together, FlapError for what is no pruned
    folder, and where the dense model or a text can't be had.
    """
    check(options)
    teacher = inputs.teacher or out.with_name(RunDir().teacher.name)
    with several_ranks(execution.rank_timeout) as ranks, ExitStack() as held:
        for place in (out, teacher):  # no other run may replace what this one reads
            held.enter_context(hold(place, ranks.rank if ranks else 0))
        progress.doing(f"opening {checkpoint}")
        folder = load_pruned(checkpoint)
        check_not_source(out, checkpoint)
        if folder.flap.made_by.mask_only:
            raise FlapError(
                f"{checkpoint} is masked in place, and training would fill its zeros: apply without --mask-only"
            )
        pruned = open_checkpoint(checkpoint, Hub(trust_remote_code=inputs.hub.trust_remote_code))
        dense = dense_of(folder.flap.made_by, inputs.model, inputs.hub, "")
        assert dense is not None  # its name is in every pruned folder
        options = _resolved(options, folder.flap, pruned)
        text_sha256 = Mixture.read(str(options.dataset)).sha256()
        request = HealingRequest(
            out, folder, pruned, dense, options, execution, teacher,
            input_sha256(folder.flap), text_sha256,
        )  # fmt: skip

        def same(found: PrunedFolder) -> bool:
            return request.answered_by(found.flap) and is_whole(found, pruned.companions)

        found = PRUNED.current(out, same, force)
        if ranks and ranks.agree(found is not None)[0]:
            return found, True
        if found:
            return found, True
        keep_old = keeps_old(out, force, progress)
        progress.doing(IMPORTING)
        from flapcli.execution.ranks import Ranks
        from flapcli.healing.distillation import heal_folder

        written = heal_folder(request, keep_old, force, progress, ranks or Ranks.alone())
        return (load_pruned(out) if written else None), False


def check(options: HealOptions) -> None:
    """Raise UsageError for options that don't go together, FlapError where peft is wanted and missing."""
    options.check()
    if not options.full and find_spec("peft") is None:
        raise FlapError("adapters need peft: pip install 'flapcli[heal]', or train all weights by --full")


def input_sha256(flap: FlapSection) -> str:
    """Hash of what a folder says of how its weights came to be, whichever version wrote it."""
    facts = flap.model_dump(include={"made_by", "healed"})
    for aside in ("version", "license", "dataset", "dataset_sha256"):
        facts["made_by"].pop(aside)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _resolved(options: HealOptions, flap: FlapSection, pruned: Checkpoint) -> HealOptions:
    """The options with what the folder decides. Raises UsageError for texts and layers that are not there."""
    made_by = flap.made_by
    given = options.dataset or default_mixture(made_by.dataset or default_text(made_by.model.name))
    mixture = Mixture.read(given)
    try:
        mixture.check()
    except UsageError as error:
        if options.dataset:
            raise
        raise FlapError(f"the calibration's text: {error}; give a text by --dataset") from error
    layers = pruned.shape.num_layers
    if max(options.hidden_layers, default=0) >= layers:
        raise UsageError(f"--hidden-layers {max(options.hidden_layers)}: {pruned.name} has layers 0 to {layers - 1}")
    tokens = options.tokens or (None if options.minutes else TOKENS)
    return replace(options, dataset=mixture.absolute().name, tokens=tokens)


def default_mixture(calibrated: str) -> str:
    """The calibration's text and the dense model's own, half each; the latter stands for all else that it knows."""
    given = Mixture.read(calibrated)
    others = [(source, weight) for source, weight in zip(given.sources, given.weights, strict=True) if source != SELF]
    if not others:
        return SELF
    return combined([*(f"{source}:{weight}" for source, weight in others), f"{SELF}:{sum(w for _, w in others)}"])
