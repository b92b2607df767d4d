"""Single query heads as attention's units: the same number of every KV group's goes, and keys stay."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.edits import edit_keep
from support.pruned import CLOSE, load_pruned, logits, masked_dense, step_by_step

from flapcli.artifacts.plan import load_plan
from flapcli.artifacts.stats import load_stats
from flapcli.checkpoints import open_checkpoint

SMALL = ["--nsamples", "12", "--seqlen", "24", "--dtype", "float32"]
UNIT = ["--attention-unit", "query_head"]
KIND, HEADS, GROUPS = "qwen2-window", 6, 3  # with biases on queries, keys and values


@pytest.fixture(scope="module")
def calibrated(tiny, flap, text_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("heads") / "run"
    flap("calibrate", tiny(KIND), "-d", run, "--dataset", text_file, *SMALL)
    return run


def test_the_lowest_head_of_every_group_goes(calibrated, flap):
    """An oracle of its own: half of the heads in every layer are those of less WIFV of each pair."""
    flap("plan", "-d", calibrated, *UNIT, "--structure", "UL-UM", "--ratio", "0.5")
    plan, stats = load_plan(calibrated / "plan.yaml"), load_stats(calibrated / "stats.safetensors")
    for layer in range(3):
        moments = stats.modules[layer, "attention"]
        score = ((moments.variance * moments.weight_square_sum).astype(np.float64) ** 2).reshape(HEADS, -1).sum(1)
        best = [2 * group + int(score[2 * group : 2 * group + 2].argmax()) for group in range(GROUPS)]
        assert plan.layers[layer].attention.unit == "query_head"
        assert plan.kept(layer, "attention").tolist() == best


@pytest.mark.parametrize("options", ["--ratio 0.3", "--structure UL-UM --ratio 0.5", "--ratio 0.5 --allow-empty"])
def test_sliced_equals_masked(options, calibrated, tiny, flap):
    flap("plan", "-d", calibrated, *UNIT, *options.split(), "--force")
    flap("apply", "-d", calibrated, "--force", "--compensate", "none")
    plan = load_plan(calibrated / "plan.yaml")
    for layer in range(3):
        counts = np.bincount(plan.kept(layer, "attention") // 2, minlength=GROUPS)
        assert len(set(counts.tolist())) == 1
    model = load_pruned(calibrated / "pruned")
    torch.testing.assert_close(logits(model), logits(masked_dense(tiny(KIND), calibrated, False)), **CLOSE)
    torch.testing.assert_close(step_by_step(model), logits(model)[:, 4:], **CLOSE)
    assert open_checkpoint(str(calibrated / "pruned")).shape.parameters == plan.parameters.model_after
    if "UL" in options:  # even: a stock checkpoint of fewer heads to a group
        config = json.loads((calibrated / "pruned" / "config.json").read_text())
        assert "auto_map" not in config
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (3, 3)


def test_emptied_attention_keeps_a_head_of_each_group_cut_off(calibrated, tiny, flap):
    flap("plan", "-d", calibrated, *UNIT, "--ratio", "0", "--force")
    edit_keep(calibrated, (1, "attention"))
    edit_keep(calibrated, (2, "attention"), keep="0,3-4")
    flap("apply", "-d", calibrated, "--force")
    weights = load_file(calibrated / "pruned" / "model-00001-of-00001.safetensors")
    assert torch.equal(weights["model.layers.1.self_attn.o_proj.weight"], torch.zeros(48, GROUPS * 8))
    model, plan = load_pruned(calibrated / "pruned"), load_plan(calibrated / "plan.yaml")
    torch.testing.assert_close(logits(model), logits(masked_dense(tiny(KIND), calibrated)), **CLOSE)
    shape = open_checkpoint(str(calibrated / "pruned")).shape
    assert shape.parameters == plan.parameters.model_after + 2 * 3 * 48  # and the biases of compensation
    again = calibrated / "again"
    assert shape.attention_unit == "query_head"  # groups are of one query head here, of two elsewhere
    told = flap("calibrate", calibrated / "pruned", "-d", again, "--attention-unit", "kv_group", code=2).stderr
    assert "have unlike numbers of heads" in told


def test_a_plan_of_unequal_groups_is_refused(calibrated, flap):
    flap("plan", "-d", calibrated, *UNIT, "--ratio", "0", "--force")
    edit_keep(calibrated, (0, "attention"), keep="0-3")
    told = flap("apply", "-d", calibrated, "--force", code=1).stderr
    assert "layer 0, attention: 2, 2, 0 query heads stay in its groups, which need equally many" in " ".join(
        told.split()
    )


def test_unit_metrics_need_their_units(calibrated, tiny, flap, text_file, tmp_path):
    flap("calibrate", tiny(KIND), "-d", tmp_path, "--dataset", text_file, *SMALL, "--fisher")
    told = flap("plan", "-d", tmp_path, "--metric", "FISHER", *UNIT, code=1).stderr
    assert "flap calibrate --attention-unit query_head" in " ".join(told.split())
    flap("calibrate", tiny(KIND), "-d", tmp_path, "--dataset", text_file, *SMALL, "--fisher", *UNIT)
    assert len(load_stats(tmp_path / "stats.safetensors").fisher[0, "attention"]) == HEADS
    flap("plan", "-d", tmp_path, "--metric", "FISHER", "--ratio", "0.3")
    assert load_plan(tmp_path / "plan.yaml").layers[0].attention.unit == "query_head"
