"""What lies beside the weights: copied by what the folder holds, and part of what "up to date" means."""

import json
import os
import shutil
from fnmatch import fnmatch

import pytest

from flapcli.checkpoints import Checkpoint, locate
from flapcli.checkpoints.companion_files import companion_files

GO = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "additional_chat_templates/rag.jinja", "qwen.tiktoken", "merges.txt", "vocab.json",
    "tokenizer.model", "source.spm", "tokenization_mine.py", "LICENSE.txt", "NOTICE", "USE_POLICY.md",
    "preprocessor_config.json", "LICENSE",
]  # fmt: skip
STAY = [
    "README.md", "plan.yaml", "modeling_flap.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "a.gguf",
    "model.onnx", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "model-1.safetensors",
    "consolidated.00.pth", "original/params.json", "original/tokenizer.model", "checkpoint-5/trainer_state.json",
    "trainer_state.json", "events.out.tfevents.1", "runs/a/events.out", ".gitattributes", ".cache/x.json",
    ".hidden/a.jinja", "__pycache__/a.pyc",
]  # fmt: skip


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a tiny model that a test may change."""
    return shutil.copytree(tiny("llama-gqa"), tmp_path / "model")


@pytest.fixture
def run(prune, model, tmp_path):
    return prune(model, tmp_path / "run")


def calibrate(flap, model, run, text):
    args = ["--dataset", text, "--nsamples", "12", "--seqlen", "24", "--dtype", "float32"]
    return flap("calibrate", model, "-d", run, *args).stderr


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_what_belongs_to_the_model_is_copied_and_fetched(model, prune, tmp_path):
    before = set(companion_files(model))
    for name in (*GO, *STAY):
        path = model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("{}" if name.endswith(".json") else "x" * 9)
    (model / "train.jsonl").touch()
    os.truncate(model / "train.jsonl", 2**27)
    assert set(companion_files(model)) == before | set(GO)
    patterns = (locate.COMPANIONS, locate.BELOW)
    for name in GO:
        assert [any(fnmatch(name, pattern) for pattern in each) for each in patterns] == [True, False], name
    for name in ("tokenizer.model", "pytorch_model.bin.index.json", "vocab.json", "merges.txt", "tokenization_mine.py"):
        (model / name).unlink()  # which no loader could read
    pruned = prune(model, tmp_path / "run") / "pruned"
    copied = set(companion_files(model))
    assert all((pruned / name).read_bytes() == (model / name).read_bytes() for name in copied)
    written = {"config.json", "README.md", "plan.yaml", "modeling_flap.py", "model.safetensors.index.json"}
    rest = {path.relative_to(pruned).as_posix() for path in pruned.rglob("*") if path.is_file()} - copied - written
    assert all(name.startswith("model-") for name in rest), rest
    prune(pruned, tmp_path / "again")  # a second round copies none of what flap writes itself
    assert set(companion_files(tmp_path / "again" / "pruned")) == copied


def test_another_tokenizer_or_template_is_another_text(model, run, flap, text_file, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "the quick brown fox " * 9}]
    chats.write_text((json.dumps({"text": turns}) + "\n") * 30)
    assert "up to date" in calibrate(flap, model, run, text_file)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "up to date" in calibrate(flap, model, run, text_file)  # which it lays out nothing of
    assert "written" in calibrate(flap, model, run, chats)
    assert "up to date" in calibrate(flap, model, run, chats)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    assert "written" in calibrate(flap, model, run, chats)
    measure = ("eval", "-d", run, model, "--perplexity", text_file, "--seqlen", 16)
    assert "written" in flap(*measure).stderr
    assert "up to date" in flap(*measure).stderr
    replace(model / "tokenizer_config.json", "{", '{"add_prefix_space": true, ')
    assert "written" in calibrate(flap, model, run, chats)
    assert "written" in flap(*measure).stderr


def test_own_text_is_sampled_anew_for_another_tokenizer(model, flap, tmp_path):
    for said in ("self.json: written", "up to date"):
        assert said in calibrate(flap, model, tmp_path / "run", "self")
    replace(model / "tokenizer_config.json", "{", '{"add_prefix_space": true, ')
    assert "self.json: written" in calibrate(flap, model, tmp_path / "run", "self")


CHANGES = {
    "generation_config.json": lambda path: replace(path, '"eos_token_id": 2', '"eos_token_id": 1'),
    "chat_template.jinja": lambda path: path.write_text("{{ messages }}"),
    "additional_chat_templates/tools.jinja": lambda path: (path.parent.mkdir(), path.write_text("{{ tools }}")),
    "LICENSE": lambda path: path.write_text("mine"),
}


def test_what_changed_beside_the_weights_is_pruned_again(model, run, flap):
    for name, change in CHANGES.items():
        assert "up to date" in flap("apply", "-d", run).stderr
        change(model / name)
        assert "written" in flap("apply", "-d", run).stderr, name
        assert (run / "pruned" / name).read_bytes() == (model / name).read_bytes()


def scramble(path):
    """Other bytes of the same length, as a failing disk leaves them."""
    before = path.stat()
    path.write_bytes(b"#" + path.read_bytes()[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGE = {
    "gone": ("modeling_flap.py", lambda path: path.unlink()),
    "card gone": ("README.md", lambda path: path.unlink()),
    "cut short": ("tokenizer.json", lambda path: os.truncate(path, 99)),
    "emptied": ("plan.yaml", lambda path: os.truncate(path, 0)),
    "scrambled": ("generation_config.json", scramble),
    "a folder instead": ("tokenizer_config.json", lambda path: (path.unlink(), path.mkdir())),
}


def test_damage_in_a_pruned_folder_is_no_user_of_it(run, flap):
    pruned = run / "pruned"
    for said, (name, damage) in DAMAGE.items():
        before = (pruned / name).read_bytes()
        damage(pruned / name)
        assert "written" in flap("apply", "-d", run).stderr, said
        assert (pruned / name).read_bytes() == before, said
    (pruned / "chat_template.jinja").write_text("my own")
    replace(pruned / "generation_config.json", '"eos_token_id": 2', '"eos_token_id": 1')
    os.utime(pruned / "generation_config.json", (2**32, 2**32))
    assert "up to date" in flap("apply", "-d", run).stderr


def test_artifacts_that_do_not_say_their_companions_are_taken_as_they_are(
    model, prune, flap, text_file, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    measure = ("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16)
    with monkeypatch.context() as older:
        older.setattr(Checkpoint, "tokenizer_sha256", lambda _self, chats: None)
        older.setattr(Checkpoint, "companions_sha256", None)
        prune(model, run)
        flap(*measure)
    report = json.loads((run / "eval.json").read_text())
    del report["settings"]["tokenizers"]
    (run / "eval.json").write_text(json.dumps(report))
    assert "up to date" in calibrate(flap, model, run, text_file)
    assert "up to date" in flap("apply", "-d", run).stderr
    assert "up to date" in flap(*measure).stderr


def test_a_gguf_that_was_cut_short_is_written_again(run, flap):
    for _ in range(2):
        assert "written" in flap("export", "gguf", "-d", run).stderr
        os.truncate(run / "pruned.gguf", (run / "pruned.gguf").stat().st_size - 5)
