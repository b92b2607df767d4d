"""Every stage of flap in one run folder of a small deep model, to be disturbed: killed, or left without disk.

Each starts from a folder that holds its inputs, with or without an older artifact in the place of its own.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from support import models
from support.forks import start, wait
from transformers import LlamaConfig

import flapcli.storage.resume

CALIBRATE = "calibrate {model} --dataset {text} --nsamples 24 --seqlen 32 --batch-size 4"
SWEEP = "sweep {model} --dataset {text} --nsamples 16 --seqlen 32 --batch-size 8 --perplexity {text} --keep"
HEAL = "heal --dataset {text} --tokens 600 --seqlen 16 --windows-per-step 8 --lora-rank 2 --top-k 16 --dtype float32"
READY = (f"{CALIBRATE} --gram --stream", "plan --ratio 0.3", "apply --max-shard-size 60KB")


@dataclass(frozen=True)
class Stage:
    """The command, what makes an older artifact, how many of READY come first, and where its artifacts lie."""

    command: str
    older: str
    ready: int
    artifacts: tuple[str, ...]


STATS, SWEPT = ("stats.safetensors",), ("plan.yaml", "eval.json", "point.json", "pruned")
STAGES = {
    "calibrate, in memory": Stage(f"{CALIBRATE} --no-stream --gram", f"{CALIBRATE} --stream --seed 1", 0, STATS),
    "the same, Fisher": Stage(f"{CALIBRATE} --no-stream --fisher", f"{CALIBRATE} --stream --seed 1", 0, STATS),
    "calibrate, streamed": Stage(
        f"{CALIBRATE} --stream --gram --activation-memory 1KB", f"{CALIBRATE} --stream --seed 1", 0, STATS
    ),
    "streamed, Fisher, Gram": Stage(
        f"{CALIBRATE} --stream --fisher --gram", f"{CALIBRATE} --stream --seed 1", 0, STATS
    ),
    "plan": Stage("plan --ratio 0.3", "plan --ratio 0.2", 1, ("plan.yaml",)),
    "apply": Stage("apply --max-shard-size 60KB", "apply --compensate none", 2, ("pruned",)),
    "apply, sequential": Stage("apply --compensate lstsq --sequential", "apply", 2, ("pruned",)),
    "heal": Stage(f"{HEAL} --lr 0.01", f"{HEAL} --lr 0.02", 3, ("healed", "teacher.safetensors")),
    "eval": Stage("eval --perplexity {text} --seqlen 32", "eval --perplexity {text} --seqlen 16", 3, ("eval.json",)),
    "export gguf": Stage(
        "export gguf --outtype f16", "export gguf --outtype f32", 3, ("pruned.gguf", "pruned.Modelfile")
    ),
    "sweep": Stage(
        f"{SWEEP} --ratios 0.2,0.3", f"{SWEEP} --ratios 0.3 --no-baseline", 0,
        (*STATS, "sweep.json", "sweep/dense.json", *(f"sweep/{r}/{name}" for r in (0.2, 0.3) for name in SWEPT)),
    ),
}  # fmt: skip


class Place:
    """Below `folder`: the model, a text, the run folder `run` that commands work in, and copies of it to begin with."""

    def __init__(self, folder: Path, run: str = "run") -> None:
        torch.set_num_threads(1)
        flapcli.storage.resume.SECONDS_BETWEEN = flapcli.storage.resume.TIMES_ITS_COST = 0
        self.folder, self.run, self.log = folder, folder / run, folder / "log"
        models.CONFIGS["deep"] = LlamaConfig(**models.SIZES | {"num_hidden_layers": 8}, **models.GQA)
        self.model = models.make_tiny(folder / "deep", "deep", shard="100KB", dtype=torch.bfloat16)
        self.text = folder / "topics.txt"
        self.text.write_text("\n\n".join(list(topics.values())[:6])[:6000])
        self.run.mkdir()
        self._keep("ready 0")
        for done, command in enumerate(READY, 1):
            self.do(command)
            self._keep(f"ready {done}")

    def begin(self, command: str, where: str = "") -> int:
        """A child that runs the command in the run folder, and then has `where` as arguments too."""
        given = command.format(model=self.model, text=self.text).split()
        return start([*given, "-d", str(self.run), *where.split()], {}, self.log, self.log)

    def do(self, command: str) -> None:
        assert wait(self.begin(command)) == 0, self.log.read_text()[-3000:]

    def bases(self, name: str) -> list[str]:
        """Names of the two copies that a stage begins with: without its artifact, and with an older one."""
        stage = STAGES[name]
        self.restore(f"ready {stage.ready}")
        self.do(stage.older)
        self._keep("older")
        return [f"ready {stage.ready}", "older"]

    def restore(self, base: str) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.folder / base, self.run)

    def _keep(self, base: str) -> None:
        shutil.rmtree(self.folder / base, ignore_errors=True)
        shutil.copytree(self.run, self.folder / base)

    def states(self, name: str, base: str, whole: Path) -> list[str]:
        """Of each artifact: absent, old as in the base, whole as in the folder `whole`, or unfinished and saying so.

        AssertionError otherwise.
        """
        found = []
        for artifact in STAGES[name].artifacts:
            now = contents(self.run / artifact)
            kinds = {"absent": {}, "old": contents(self.folder / base / artifact), "whole": contents(whole / artifact)}
            kind = next((kind for kind, expected in kinds.items() if now == expected), None)
            if kind is None and not kinds["old"] and artifact.endswith(".json") and json.loads(now[""])["unfinished"]:
                kind = "unfinished"  # says itself that it holds what was measured before the end
            assert kind, f"{name}: {artifact} is neither absent, old nor whole ({sorted(now)})"
            found.append(kind)
        return found


def contents(path: Path, card: bool = False) -> dict[str, bytes]:
    """Every file's bytes by name; of pruned folders without the model card, which eval renews."""
    if path.is_file():
        return {"": path.read_bytes()}
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if card or file.name != "README.md"}
