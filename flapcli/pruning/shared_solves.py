"""Closed-form fits shared out over the processes of one `flap apply`: every layer's are solved by one of them alone.

So they are the same to the bit by any number of processes. Each puts its own into files of one folder that all see, in
which a run that was killed, of whatever number, finds them again.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flapcli.errors import FlapError
from flapcli.execution.ranks import Ranks, refuse_unlike
from flapcli.progress import Progress
from flapcli.pruning.compensation import ClosedForm, Fit
from flapcli.pruning.cut import ModuleCut, read_output
from flapcli.pruning.layout import Layout, Output
from flapcli.pruning.sequential_fit import StoredFits
from flapcli.storage.atomic import require_space
from flapcli.storage.resume import Resume, key_of


@dataclass(frozen=True)
class Solved(ClosedForm):
    """A closed form whose fits are in files."""

    fits: StoredFits = field(kw_only=True)

    def fit(self, weight: torch.Tensor, cut: ModuleCut) -> Fit:
        return self.fits.fit(weight, cut)


def resume_of_solves(out: Path, facts: dict[str, Any], anew: bool, ranks: Ranks) -> Resume:
    """The folder beside `out` of all ranks' fits: rank 0 makes it, `anew` an empty one, before the others look.

    `facts` are all that decides the fits. Raises FlapError where they are not the same on all ranks.
    """
    refuse_unlike(ranks, facts, "give all the same files and options")
    if ranks.rank:
        ranks.agree(None)
    found = Resume(out, key_of(facts, b""), folder="solves")
    if not ranks.rank:
        if anew:
            found.discard()
        found.ready()
        ranks.agree(None)
    return found


def solve_by_ranks(closed_form: ClosedForm, layout: Layout, resume: Resume, ranks: Ranks, progress: Progress) -> Solved:
    """The fits of every output projection that is written, on rank 0; of use there alone.

    Raises FlapError where the disk has no room for them and the checkpoint, or rank 0 does not see the others' files.
    """
    fits, cuts = StoredFits(resume.folder), [step.cut for step in layout.steps if isinstance(step, Output)]
    missing = ranks.agree([i for i, cut in enumerate(cuts) if not fits.holds(cut)])[0]
    if len(missing) < len(cuts):
        progress.note(f"going on: {len(cuts) - len(missing)} of {len(cuts)} solves are there")
    if ranks.rank == 0:
        channels = sum(len(cuts[i].kept) for i in missing)
        require_space(resume.parent.parent, layout.nbytes + 4 * layout.checkpoint.shape.hidden_size * channels)
    own = set(sorted({cuts[i].layer for i in missing})[ranks.rank :: ranks.size])
    mine = [cuts[i] for i in missing if cuts[i].layer in own]
    with torch.inference_mode(), progress.task("solve", len(mine), "modules") as advance:
        for cut in mine:
            fits.put(cut, closed_form.fit(read_output(layout.checkpoint, cut)[0], cut))
            ranks.check()
            advance(1)
    ranks.agree(None)
    if ranks.rank == 0 and (absent := [cut for cut in cuts if not fits.holds(cut)]):
        raise FlapError(
            f"what another rank solved of layer {absent[0].layer} is not in {resume.folder}: keep the pruned folder on "
            "a volume that all ranks share"
        )
    return Solved(**vars(closed_form), fits=fits)
