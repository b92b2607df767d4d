"""`flap heal`. What is heavy is imported inside."""

from pathlib import Path
from typing import Annotated

from flapcli.cli import options as o
from flapcli.cli.command import RUN, command, tell
from flapcli.cli.heal_options import HealGroup
from flapcli.views import terminal
from flapcli.views.display import Display


@command("heal")
def heal(
    checkpoint: Annotated[Path | None, o.Checkpoint(help="Pruned folder to train.")] = None,
    run_dir: o.Run = RUN,
    model: o.DenseModel = None,
    out: o.Out = None,
    *,
    healing: HealGroup,
    windows: o.WindowGroup,
    execution: o.ExecutionGroup,
    hub: o.HubGroup,
    force: o.Force = False,
    as_json: o.Json = False,
) -> None:
    """Train the pruned model to answer like the dense one -> DIR/healed/, a folder like DIR/pruned/.

    Written only where it reads held-out text better. Killed, it goes on where it stopped when run again. Several
    processes share the windows: torchrun --nproc-per-node 2 -m flapcli heal ...
    """
    from flapcli.execution.processes import is_writer

    path = out or run_dir / "healed"
    with Display("heal", is_writer()) as display:
        from flapcli.cli.resolve import healing_execution_of, healing_of, hub_of
        from flapcli.healing import stage

        options, how = healing_of(healing, windows), healing_execution_of(healing, execution)
        inputs = stage.HealInputs(model, hub_of(hub))
        folder, cached = stage.heal(checkpoint or run_dir / "pruned", path, options, inputs, how, force, display)
    if folder and is_writer():
        tell(path, folder, cached, as_json, display.took)
    elif as_json and is_writer():
        terminal.data(None)
