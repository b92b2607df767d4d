"""Costs by formula equal counted ones; timing fills the report; the words follow the figures."""

import json

import pytest
import torch
from support.models import load_dense
from torch.utils.flop_counter import FlopCounterMode

from flapcli.architecture import modeling_flap as modeling
from flapcli.artifacts.eval_report import EvalReport, Spread
from flapcli.checkpoints import open_checkpoint
from flapcli.evaluation.speed import macs_per_token, odd_width_share, spread
from flapcli.views.eval_rows import speed_lines


def counted(model, length):
    """Multiply-accumulates of one forward pass by torch's own counter, attention as plain products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None], use_cache=False)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", ["llama-gqa", "llama-mha", "llama-head-dim", "qwen3"])
def test_macs_equal_torchs_count(kind, tiny, prune, tmp_path):
    run, length = prune(tiny(kind), tmp_path / "run", "--ratio 0.4"), 20
    pruned = getattr(modeling, f"Flap{open_checkpoint(str(tiny(kind))).family.architecture}")
    models = {tiny(kind): load_dense(tiny(kind)), run / "pruned": pruned.from_pretrained(run / "pruned")}
    for folder, model in models.items():
        shape = open_checkpoint(str(folder)).shape
        assert counted(model, length) == length * macs_per_token(shape, length, model.config.vocab_size)


def test_speed_is_measured_for_both_models(tiny, prune, flap, text_file, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run", "--ratio 0.4")
    flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16, "--speed", "--speed-rounds", 3,
         "--speed-batch-sizes", "1,2", "--speed-lengths", "8,16", "--speed-new-tokens", 4, "--threads", 1)  # fmt: skip
    report = EvalReport.model_validate_json((run / "eval.json").read_bytes())
    for measured in (report, report.baseline):
        details = measured.speed_details
        assert [(c.batch_size, c.prompt_tokens) for c in details.cases] == [(1, 8), (1, 16), (2, 8), (2, 16)]
        assert set(measured.speed) == {
            "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"
        }  # fmt: skip
        assert measured.speed["decode_tokens_per_second"] == details.cases[0].decode.median
        assert measured.speed["peak_memory_bytes"] > details.weight_bytes > 0
        assert (details.threads, details.rounds) == (1, 3)
    assert report.speed_details.weight_bytes == 4 * report.size.parameters
    shapes = [open_checkpoint(str(path)).shape for path in (tiny("llama-gqa"), run / "pruned")]
    dense, pruned = (macs_per_token(shape, 4.5) for shape in shapes)
    assert report.speedup[0].prefill_possible == pytest.approx(dense / pruned)
    assert len(report.speedup) == 4
    assert sum("x the dense speed" in line for line in speed_lines(report)) == 8
    assert json.loads((run / "eval.json").read_text())["settings"]["speed"]["threads"] == 1


def test_words_say_plainly_when_pruning_did_not_pay(tiny, prune, flap, text_file, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run", "--ratio 0.4")
    flap("eval", "-d", run, "--perplexity", text_file, "--seqlen", 16, "--speed", "--speed-rounds", 1,
         "--speed-lengths", "8", "--speed-new-tokens", 2)  # fmt: skip
    report = EvalReport.model_validate_json((run / "eval.json").read_bytes())
    report.speedup[0].prefill = Spread(median=0.9, low=0.8, high=1.1)
    report.speedup[0].decode = Spread(median=1.2, low=1.1, high=1.3)
    lines = speed_lines(report)
    assert lines[0].endswith("pruning did not pay")
    assert lines[1].endswith("pruning paid")
    assert any("--round-to" in line for line in lines[2:])
    report.speedup[0].decode = Spread(median=1.01, low=0.9, high=1.3)
    assert speed_lines(report)[1].endswith("within the machine's noise")


def test_odd_widths_and_spread(tiny):
    shape = open_checkpoint(str(tiny("llama-gqa"))).shape
    assert odd_width_share(shape) == 1  # 56
    assert odd_width_share(shape, 8) == 0
    assert spread([3.0, 1.0, 2.0]) == Spread(median=2, low=1, high=3)


@pytest.mark.parametrize("options", [["--speed-batch-sizes", "1,0"], ["--speed-lengths", "a"]])
def test_bad_numbers_are_misuse(options, flap, tmp_path):
    assert options[0] in flap("eval", "-d", tmp_path, "--speed", *options, code=2).stderr


def test_prompts_longer_than_the_model_are_misuse(tiny, flap, text_file, tmp_path):
    command = ["eval", tiny("llama-gqa"), "--no-baseline", "--perplexity", text_file, "--out", tmp_path / "eval.json"]
    assert "256 positions" in flap(*command, "--speed", "--speed-lengths", "250", code=2).stderr
