"""The run folder: where the artifacts of one pruning run lie."""

from pathlib import Path


class RunDir:
    """The places of a run's artifacts below `folder`; nothing needs to be there yet."""

    def __init__(self, folder: Path | str = "flap-run") -> None:
        self.path = Path(folder)
        self.stats = self.path / "stats.safetensors"
        self.plan = self.path / "plan.yaml"
        self.pruned = self.path / "pruned"
        self.eval = self.path / "eval.json"
        self.gguf = self.path / "pruned.gguf"
        self.sweep = self.path / "sweep.json"
