"""A target of parameters or bytes: the largest plan that is not over it, counted as apply writes it."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import make_tiny

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_header
from flapcli.checkpoints import open_checkpoint
from flapcli.planning.target_search import STEPS
from flapcli.storage.sizes import parse_count

STRUCTURES = ["", "--structure UL-UM", "--structure AL-MM --remove-heads 2", "--method depth",
              "--heads-multiple-of 2 --round-to 4", "--allow-empty --metric IFV"]  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(tiny, prune, tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = prune(tiny(kind), tmp_path_factory.mktemp(kind) / "run")
        return made[kind]

    return get


def written(run, flap, tmp_path, plan, *options):
    """Parameters and bytes of what apply writes by a plan."""
    flap("apply", "-d", run, "--plan", plan, "--stats", run / "stats.safetensors", "--out", tmp_path / "out", *options,
         "--force")  # fmt: skip
    size = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    return open_checkpoint(str(tmp_path / "out")).shape.parameters, size


@pytest.mark.parametrize("options", STRUCTURES)
@pytest.mark.parametrize("kind", ["llama-biases"])
def test_the_largest_plan_that_is_not_over(calibrated, flap, tmp_path, kind, options):
    run, plan = calibrated(kind), tmp_path / "plan.yaml"
    dense = load_header(run / "stats.safetensors").model
    limit = int(dense.parameters * 0.83)
    flap("plan", "-d", run, "--out", plan, "--target-params", limit, *options.split())
    found = load_plan(plan)
    parameters, _ = written(run, flap, tmp_path, plan)
    assert parameters <= limit
    assert found.settings["target_params"] == limit
    # A plan by the ratio found is the same plan, and one by a ratio just below it is over the target.
    flap("plan", "-d", run, "--out", plan, "--ratio", repr(found.ratio.requested), *options.split(), "--force")
    assert load_plan(plan).layers == found.layers
    less = found.ratio.requested
    while load_plan(plan).layers == found.layers:
        less = max(less - max(2, round(STEPS * 1e-5)) / STEPS, 0.0)
        flap("plan", "-d", run, "--out", plan, "--ratio", repr(less), *options.split(), "--force")
    larger, _ = written(run, flap, tmp_path, plan)
    assert larger > limit
    if options in ("", "--allow-empty --metric IFV"):  # one unit apart
        unit = max(dense.unit_parameters(m) + dense.unit_biases[m] for m in ("attention", "mlp"))
        assert larger - parameters <= unit


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
@pytest.mark.parametrize("options", ["", "--method mag-sp", "--structure UL-UM"])
def test_bytes_are_those_that_apply_writes(calibrated, flap, tmp_path, kind, options):
    run, plan = calibrated(kind), tmp_path / "plan.yaml"
    dense = load_header(run / "stats.safetensors").model
    step = (
        4 * (dense.num_layers if options else 1) * (dense.unit_parameters("attention") + dense.unit_parameters("mlp"))
    )
    for limit, dtype, width in ((dense.parameters * 3, None, 4), (dense.parameters * 3 // 2, "bfloat16", 2)):
        chosen = ["--dtype", dtype] if dtype else []
        flap("plan", "-d", run, "--out", plan, "--target-size", limit, *options.split(), *chosen)
        parameters, size = written(run, flap, tmp_path, plan)  # apply follows the plan's dtype
        assert size == width * parameters
        assert limit - step < size <= limit


def test_a_source_of_two_types(prune, flap, tmp_path):
    """bfloat16 projections beside float32 embeddings and norms: exact all the same."""
    dense = make_tiny(tmp_path / "dense", "llama-gqa")
    tensors = load_file(dense / "model.safetensors")
    half = {n: t.bfloat16() if "_proj" in n else t for n, t in tensors.items()}
    save_file(half, dense / "model.safetensors", {"format": "pt"})
    run = prune(dense, tmp_path / "run")
    limit = sum(t.nbytes for t in half.values()) - 20_000
    flap("plan", "-d", run, "--target-size", limit)
    _, size = written(run, flap, tmp_path, run / "plan.yaml")
    unit = 2 * load_header(run / "stats.safetensors").model.unit_parameters("attention")
    assert limit - unit < size <= limit


def test_asked_again_it_is_up_to_date(calibrated, flap, tmp_path):
    plan = tmp_path / "plan.yaml"
    args = ("plan", "-d", calibrated("llama-gqa"), "--out", plan, "--target-params", "50K")
    said = flap(*args)
    assert "at most 50,000 parameters, biases that compensation adds included" in said.stdout
    assert "up to date" in flap(*args).stderr
    assert "written" in flap(*args, "--no-target-biases").stderr
    assert load_plan(plan).settings["target_biases"] is False


@pytest.mark.parametrize(
    ("option", "share", "of"), [("--target-params", "75%", 1), ("--target-size", "75% --dtype bfloat16", 2)]
)
def test_shares_of_the_dense_model(calibrated, flap, tmp_path, option, share, of):
    run, plan = calibrated("llama-gqa"), tmp_path / "plan.yaml"
    flap("plan", "-d", run, "--out", plan, option, *share.split())
    dense = load_header(run / "stats.safetensors").model.parameters
    limit = int(dense * of * int(share[:2]) / 100)
    assert load_plan(plan).settings[option[2:].replace("-", "_")] == limit


def test_without_biases_more_units_stay(calibrated, flap, tmp_path):
    run = calibrated("llama-gqa")
    for name in ("--target-biases", "--no-target-biases"):
        flap("plan", "-d", run, "--out", tmp_path / name, "--target-params", 60000, name)
    one, two = (load_plan(tmp_path / name) for name in ("--target-biases", "--no-target-biases"))
    assert one.parameters.kept < two.parameters.kept
    assert written(run, flap, tmp_path, tmp_path / "--no-target-biases", "--compensate", "none")[0] <= 60000
    # Apply says where its options make more of it than was counted.
    said = flap("apply", "-d", run, "--plan", tmp_path / "--no-target-biases", "--stats", run / "stats.safetensors",
                "--out", tmp_path / "larger")  # fmt: skip
    assert "parameters are written (F32), more than the plan's --target-params 60,000" in " ".join(said.stderr.split())


def test_run_takes_targets(tiny, flap, text_file, tmp_path):
    args = ["run", tiny("llama-gqa"), "-d", tmp_path / "run", "--dataset", text_file, "--nsamples", 8, "--seqlen", 16]
    flap(*args, "--target-size", "100KB", "--store-dtype", "bfloat16", "--no-eval")
    assert not (tmp_path / "run" / "eval.json").exists()
    flap("eval", "-d", tmp_path / "run", "--perplexity", text_file, "--no-baseline")
    size = json.loads((tmp_path / "run" / "eval.json").read_text())["size"]
    assert size["stored_as"] == "BF16"
    assert 100_000 - 2 * 48 * 2 * 4 * 8 * 2 < size["bytes"] <= 100_000
    assert load_plan(tmp_path / "run" / "plan.yaml").settings["target_size"] == 100_000
    refused = [("--mask-only --target-params 50K", "--mask-only leaves the size as it is"),
               ("--no-eval --speed", "--speed is for --eval"),
               ("--ratio 0.2 --target-params 50K", "leave out --ratio 0.2")]  # fmt: skip
    for options, words in refused:
        assert words in flap(*args[:3], tmp_path / "none", *args[4:], *options.split(), code=2).stderr
    assert not (tmp_path / "none").exists()  # before any calibration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--target-params 50K --target-size 1MB", "exclude each other"),
        ("--target-params 50K --ratio 0.2", "leave out --ratio 0.2"),
        ("--target-size 200KB --ratio 0.2", "leave out --ratio 0.2"),
        ("--target-params 50K --dtype float16", "--dtype float16 is for --target-size"),
        ("--dtype float16", "--dtype float16 is for --target-size"),
        ("--target-biases", "--target-biases is for --target-params"),
        ("--target-params 50X", "--target-params 50X: give a number of parameters such as 100M"),
        ("--target-params -5", "--target-params -5"),
        ("--target-params 0", "--target-params 0"),
        ("--target-params=", "--target-params : give a number"),
        ("--target-size 5X", "--target-size 5X: give a size"),
        ("--target-size infMB", "--target-size infMB: give a size"),
        ("--target-size 150%", "--target-size 150%: give a share of the dense model"),
        ("--target-params 1B", "--target-params 1,000,000,000: the dense model has only"),
        ("--target-size 1GB", "bytes of weights"),
        ("--target-params 1K", "--target-params 1,000 can't be reached: these options remove at most 0."),
        ("--target-params 1K --structure AL-MM --remove-heads 2", "can't be reached: these options remove at most 0."),
        ("--target-params 50K --round-to 64", "--round-to 64: layer 0, mlp has only 56 units"),
        ("--target-params 50K --structure AL-MM", "needs --remove-heads N"),
    ],
)
def test_misuse(calibrated, flap, options, words):
    run = calibrated("llama-gqa")
    before = (run / "plan.yaml").read_bytes()
    said = flap("plan", "-d", run, *options.split(), code=2).stderr
    assert words in said
    assert said.count("\n") == 1
    assert (run / "plan.yaml").read_bytes() == before


def test_statistics_of_an_older_flap(calibrated, flap, tmp_path):
    """They lack the weights' bytes: parameters are counted all the same, bytes with --dtype."""
    run = calibrated("llama-gqa")
    old = tmp_path / "stats.safetensors"
    with safe_open(run / "stats.safetensors", "np") as file:
        header = json.loads(file.metadata()["flap"])
    del header["model"]["weights"]
    save_file(load_file(run / "stats.safetensors"), old, {"flap": json.dumps(header)})
    said = flap("plan", "-d", tmp_path, "--target-size", "200KB", code=1).stderr
    assert "give --dtype" in said
    assert "flap calibrate --force" in said
    flap("plan", "-d", tmp_path, "--target-size", "200KB", "--dtype", "float32")
    flap("plan", "-d", run, "--out", tmp_path / "new.yaml", "--target-size", "200KB")
    assert load_plan(tmp_path / "plan.yaml").layers == load_plan(tmp_path / "new.yaml").layers


@pytest.mark.parametrize(
    ("text", "count"), [("100M", 10**8), ("1.5b", 15 * 10**8), ("250000", 250000), ("135k", 135000), ("0.1K", 100)]
)
def test_counts(text, count):
    assert parse_count(text, "--target-params") == count
