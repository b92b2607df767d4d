"""The dense model behind a pruned folder: what it is measured beside, and learns from."""

from dataclasses import replace

from flapcli.architecture.flap_section import MadeBy
from flapcli.checkpoints import Checkpoint, Hub, open_checkpoint
from flapcli.errors import FlapError


def dense_of(
    made_by: MadeBy | None, model: str | None, hub: Hub, otherwise: str = ", or leave it out by --no-baseline"
) -> Checkpoint | None:
    """The checkpoint that a pruned folder was made from; None for what was not pruned and where none is named.

    Raises FlapError, which ends in what to do `otherwise`, where it can't be opened, or is another by now.
    """
    source = made_by.model if made_by else None
    name = model or (source.name if source else None)
    if name is None:
        return None
    hub = replace(hub, revision=hub.revision or (source.revision if source else None))
    try:
        dense = open_checkpoint(name, hub)
    except FlapError as error:
        raise FlapError(f"the dense model can't be opened ({error}): give --model{otherwise}") from error
    if source and dense.fingerprint != source.fingerprint:
        raise FlapError(
            f"{dense.name} ({dense.fingerprint[:12]}) is not the model that was pruned "
            f"({source.name}, {source.fingerprint[:12]}): give --model{otherwise}"
        )
    return dense
