"""What a user put into a pruned folder, or changed there, is not lost by the next apply."""

import os
import time

import pytest


def touch_later(path):
    later = time.time() + 60  # a tick of the file system's clock and more
    os.utime(path, (later, later))


@pytest.fixture
def run(tiny, prune, tmp_path):
    return prune(tiny("llama-gqa"), tmp_path / "run")


def replan(flap, run):
    flap("plan", "-d", run, "--ratio", 0.2)


CHANGES = {
    "a note": lambda pruned: (pruned / "notes.txt").write_text("mine"),
    "a checkpoint": lambda pruned: ((pruned / "checkpoint-500").mkdir(), (pruned / "checkpoint-500" / "a").touch()),
    "weights tuned in place": lambda pruned: touch_later(next(pruned.glob("*.safetensors"))),
    "a card of one's own": lambda pruned: (pruned / "README.md").write_text("my model"),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_with_what_is_not_flaps_is_refused_and_forced_aside(run, flap, change):
    pruned = run / "pruned"
    for old in (run / "pruned.old", run / "pruned.old-2"):
        change(pruned)
        before = contents(pruned)
        replan(flap, run)
        if old.name == "pruned.old":  # another ratio than the folder's
            said = flap("apply", "-d", run, code=1).stderr
            assert "flap did not write" in " ".join(said.split())
            assert contents(pruned) == before
        flap("apply", "-d", run, "--force")
        assert contents(old) == before
    assert contents(run / "pruned.old") != contents(pruned)


def test_flaps_own_folder_is_replaced_as_ever(run, flap, text_file):
    flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 24, "--no-baseline")  # renews the model card
    replan(flap, run)
    assert "written" in flap("apply", "-d", run).stderr
    assert not list(run.glob("pruned.old*"))


def test_a_second_round_into_its_own_source_is_refused_before_work(run, flap):
    before = (run / "stats.safetensors").read_bytes()
    said = flap("run", run / "pruned", "-d", run, code=2).stderr
    assert "is the model itself" in said
    assert (run / "stats.safetensors").read_bytes() == before
    said = flap("apply", "-d", run, "--model", run / "pruned", "--force", code=2).stderr
    assert "is the model itself" in said
