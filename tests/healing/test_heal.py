"""`flap heal`: a pruned folder comes back trained, in the same form, or not at all."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from support.families import make_family
from support.models import load_tokenizer
from support.pruned import IDS, load_pruned, logits, without_flapcli
from support.stages import contents
from transformers import AutoModelForCausalLM

from flapcli.artifacts.pruned_folder import load_pruned as load_folder
from flapcli.healing.training import Trainer
from flapcli.healing.training_state import TrainingState
from flapcli.storage import resume
from flapcli.texts.corpus import calibration_windows

SMALL = (
    "--tokens", 1100, "--seqlen", 24, "--windows-per-step", 8, "--lora-rank", 4, "--dtype", "float32", "--lr", 0.01
)  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tiny, prune, tmp_path_factory):
    return prune(tiny("llama-gqa"), tmp_path_factory.mktemp("pruned") / "run")


@pytest.fixture(scope="module")
def healed(pruned, text_file, flap):
    """A run with a healed folder that was trained on a text alone, and what was said of it."""
    said = flap("heal", "-d", pruned, "--dataset", text_file, "--top-k", 320, *SMALL).stderr
    return pruned, said


@pytest.fixture
def heal(healed, text_file, flap, tmp_path):
    """Heals a copy of the run with more options, the teacher's answers there already."""
    run = tmp_path / "run"
    shutil.copytree(healed[0], run)

    def call(*more, code=0, seed=0):
        asked = ("--dataset", text_file, "--top-k", 320, *SMALL, "--seed", seed)
        return run, flap("heal", "-d", run, *asked, *more, code=code).stderr

    return call


def record(folder):
    return load_folder(folder).flap.healed


def test_the_folder_is_like_the_pruned_one_and_better(healed, flap, text_file, tmp_path):
    run, said = healed
    before, after = (load_pruned(run / name) for name in ("pruned", "healed"))
    assert "320 likeliest tokens at 1,344 places take 0.00 GB" in said
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    trained = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert trained == {name for name in shapes[0] if name.endswith("_proj.weight")}
    files = [{path.name for path in (run / name).iterdir()} for name in ("pruned", "healed")]
    assert files[0] == files[1]
    made = record(run / "healed")
    assert made.after < made.before
    assert made.after == pytest.approx(min(point.validation for point in made.curve))
    assert made.curve[-1].tokens == made.tokens == 1152  # whole steps
    without_flapcli(f"assert torch.equal(load({str(run / 'healed')!r})(ids).logits, expected)", logits(after), tmp_path)
    card = (run / "healed" / "README.md").read_text()
    assert "pruned and healed by flap" in card and f"tokens of {text_file.name}, loss kl, seed 0" in card
    assert str(text_file) not in card
    assert "healed" in json.loads(flap("show", run, "--json").stdout)
    assert "loss on held-out windows" in flap("show", run / "healed").stdout


def test_the_loss_is_that_of_the_folder_as_written(healed, tiny, text_file):
    """By the end of the text alone, transformers' own forward and torch's own divergence."""
    made = record(healed[0] / "healed")
    ids = calibration_windows(str(text_file), load_tokenizer(tiny("llama-gqa")), 8, 24, 0, held_out=True)
    said = []
    for folder in (tiny("llama-gqa"), healed[0] / "healed"):
        load = AutoModelForCausalLM.from_pretrained if folder == tiny("llama-gqa") else load_pruned
        said.append(logits(load(folder), torch.from_numpy(ids))[:, :-1].log_softmax(-1).flatten(0, 1))
    found = torch.nn.functional.kl_div(said[1], said[0], reduction="batchmean", log_target=True)
    assert float(found) == pytest.approx(made.after, rel=1e-3)


def test_held_out_windows_are_of_another_part_of_the_text(tiny, text_file):
    tokenizer = load_tokenizer(tiny("llama-gqa"))
    ids = tokenizer(text_file.read_text()).input_ids
    for is_held_out in (True, False):
        windows = calibration_windows(str(text_file), tokenizer, 60, 24, 1, held_out=is_held_out)
        cut = len(ids) - len(ids) // 20
        part = " ".join(map(str, ids[cut:] if is_held_out else ids[:cut]))
        assert all(" ".join(map(str, window)) in part for window in windows.tolist())


def test_asked_again_it_is_there(heal):
    run, said = heal()
    assert said == f"{run / 'healed'}: up to date\n"


@pytest.mark.parametrize(
    "more",
    [("--online",), ("--full", "--lr", "0.001"), ("--loss", "ce"), ("--hidden-layers", "0,2", "--loss", "kl+ce"),
     ("--force", "--checkpoint-activations"), ("--dtype", "bfloat16")],
    ids=" ".join,
)  # fmt: skip
def test_other_ways_make_it_better_too(heal, healed, more):
    run, said = heal(*more)
    made, plain = record(run / "healed"), record(healed[0] / "healed")
    assert made.after < made.before and "healed: written" in said
    assert ("likeliest" in said) == (more[0] in ("--hidden-layers", "--dtype", "--force"))  # else what is kept serves
    assert torch.isfinite(logits(load_pruned(run / "healed"))).all()
    if more[-1] in ("--online", "--checkpoint-activations"):  # the same but for rounding
        assert (made.before, made.after) == pytest.approx((plain.before, plain.after), rel=1e-3)


def test_adapters_cut_short_go_on_to_the_same_bits(heal, healed, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0)
    monkeypatch.setattr(resume, "TIMES_ITS_COST", 0)
    step = Trainer.step

    def stop(self, optimiser, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, optimiser, number)

    monkeypatch.setattr(Trainer, "step", stop)
    run, said = heal("--force", code=130)
    assert "interrupted" in said
    monkeypatch.setattr(Trainer, "step", step)
    shutil.rmtree(run / "healed")
    run, said = heal()
    assert "going on after step 4 of 6" in said
    assert contents(run / "healed", card=True) == contents(healed[0] / "healed", card=True)
    assert not list(run.glob(".*"))


def test_what_does_not_become_better_is_not_written(heal, healed):
    run, said = heal("--lr", 3)
    assert "healed is not written: on held-out windows the loss did not fall" in said
    assert contents(run / "healed", card=True) == contents(healed[0] / "healed", card=True)  # what was there stays
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("read", "harms"),
    [([3.0, 3.1, 3.2], True), ([2.0, 2.5, 2.6, 2.7], False), ([2.0, 3.0, 3.0, 3.0], True), ([3.1, 3.1], False)],
)
def test_training_ends_where_it_does_harm_not_where_it_stands_still(read, harms):
    state = TrainingState.begin({}, 3.0)
    for tokens, validation in enumerate(read, 1):
        state.took(1.0)
        state.mark(tokens, validation, {})
    assert state.harms(3) == harms


def test_own_text_and_minutes(pruned, flap, tmp_path):
    how = ("--minutes", 0.02, *SMALL[2:], "--top-k", 8, "--dataset", "self")
    said = flap("heal", "-d", pruned, "-o", tmp_path / "healed", *how).stderr
    tokens = int(re.search(r"0.02 minutes hold about ([\d,]+) tokens here", said)[1].replace(",", ""))
    assert "teacher.self.json: written" in said
    if (tmp_path / "healed").exists():  # which a slow machine has no time for
        assert record(tmp_path / "healed").tokens <= tokens


def test_eval_report_and_heal_take_the_folder(heal, flap, text_file):
    run, _ = heal()
    flap("eval", run / "healed", "-d", run, "--perplexity", text_file, "--seqlen", 24)
    report = json.loads((run / "eval.json").read_text())
    assert report["baseline"] and report["checkpoint"].endswith("healed")
    assert "perplexity" in (run / "healed" / "README.md").read_text()
    flap("report", "-d", run)
    page = (run / "report.html").read_text()
    assert "<h2>Healing</h2>" in page and "flap heal -d" in page and "another checkpoint" not in page
    shutil.copytree(run / "healed", run / "copy")
    os.utime(run / "copy" / "config.json", (0, 0))  # copies need not keep the order that files were written in
    (run / "copy" / "notes.txt").write_text("a user's")
    flap("heal", run / "copy", "-d", run, "-o", run / "twice", "--dataset", text_file, "--top-k", 320, *SMALL)
    assert {path.name for path in (run / "twice").iterdir()} == {path.name for path in (run / "pruned").iterdir()}
    assert record(run / "twice").before == pytest.approx(record(run / "healed").after, rel=1e-4)
    flap("apply", "-d", run, "--compensate", "none")
    assert "healed: written" in heal()[1]  # of another pruned folder


def test_llamacpp_computes_what_torch_computes(heal, flap, tmp_path):
    llamacpp = pytest.importorskip("support.llamacpp", reason="the extra gguf-test brings it", exc_type=ImportError)
    run, _ = heal()
    flap("export", "gguf", run / "healed", "-o", tmp_path / "x.gguf", "--outtype", "f32")
    expected = logits(load_pruned(run / "healed"))[0, -1].log_softmax(-1)
    found = torch.from_numpy(llamacpp.LlamaCpp(tmp_path / "x.gguf", 320).next_logprobs(IDS[0].tolist()))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


STOCK = ("--structure UL-UM --ratio 0.34", "--compensate none")  # even layers and no biases


@pytest.mark.parametrize(
    ("name", "ways", "how"), [("gpt2", 2, ()), ("opt", 1, ()), ("qwen3_moe", 2, ()), ("gemma3_text", 1, STOCK)]
)
def test_families(name, ways, how, prune, flap, text_file, tmp_path):
    """Adapters, then all weights: of transposed projections, experts, norms around modules, an MLP without parent."""
    run = prune(make_family(tmp_path / "model", name), tmp_path / "run", *how)
    for more in ((), ("--full", "--lr", "0.001"))[:ways]:
        flap("heal", "-d", run, "--dataset", text_file, "--top-k", 32, *SMALL, *more)
        made = record(run / "healed")
        assert made.after < made.before and made.settings["full"] == bool(more)
        assert torch.isfinite(logits(load_pruned(run / "healed"))).all()
        assert ("auto_map" in load_folder(run / "healed").config) == (how != STOCK)  # stock stays stock


def test_run_and_sweep(tiny, text_file, flap, tmp_path):
    small = ("--dataset", text_file, "--nsamples", 12, "--seqlen", 24, "--dtype", "float32", "--no-baseline")
    run = ("run", tiny("llama-gqa"), "-d", tmp_path / "run", *small, "--ratio", 0.3, "--heal-minutes", 0.01)
    said = flap(*run).stdout
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    better = (tmp_path / "run" / "healed").exists()
    assert report["checkpoint"].endswith("healed") == better
    assert (f"flap export gguf {tmp_path}/run/healed -d {tmp_path}/run" in said) == better
    assert flap(*run).stderr.count("up to date") == (5 if better else 4)
    sweep = ("sweep", tiny("llama-gqa"), "-d", tmp_path / "run", *small, "--ratios", 0.3, "--heal-tokens", 1000)
    flap(*sweep)
    point = tmp_path / "run" / "sweep" / "0.3"
    assert json.loads((point / "eval.json").read_text())["checkpoint"].endswith("healed")
    assert not (point / "pruned").exists() and not (point / "healed").exists()
    flap(*sweep, "--keep")
    assert (point / "pruned").exists() and record(point / "healed").settings["tokens"] == 1000


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--minutes", 1), "--tokens and --minutes both say how long"),
        (("--hidden-layers", "3"), "--hidden-layers 3: "),
        (("--hidden-layers", "x"), "--hidden-layers x: give numbers of at least 0"),
        (("--batch-size", "0"), "--batch-size 0"),
    ],
)
def test_misuse(heal, more, told):
    assert told in heal(*more, code=2)[1]


def test_a_file_of_another_kind_is_not_replaced(heal):
    place = heal()[0] / "teacher.safetensors"
    place.write_text("a user's")
    _, said = heal(seed=1, code=1)
    assert said == f"error: {place} exists and is not what flap keeps of a teacher (flap-teacher/1): move it away\n"
    assert place.read_text() == "a user's"


def test_peft_is_asked_for_by_name(heal, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    _, said = heal("--force", code=1)
    assert said == "error: adapters need peft: pip install 'flapcli[heal]', or train all weights by --full\n"


def test_what_is_no_pruned_folder_is_refused(tiny, flap, tmp_path):
    said = flap("heal", tiny("llama-gqa"), "-d", tmp_path, code=1).stderr
    assert "is a checkpoint that flap did not write" in said
    assert "is no pruned folder" in flap("heal", "-d", tmp_path, code=1).stderr
