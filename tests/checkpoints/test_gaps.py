"""A checkpoint that lacks something, or says two things at once, is refused before any work, however it is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError


def changed(folder, to, drop=(), config=None, **add):
    """A copy of a checkpoint without some tensors, with others, and with other keys in config.json."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: t for name, t in weights.items() if name not in drop} | add, to / "model.safetensors")
    if config:
        known = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(known | config))
    return to


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight", "model.layers.0.mlp.up_proj.weight",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_a_missing_tensor_is_named(name, way, tiny, flap, text_file, tmp_path):
    folder = changed(tiny("llama-gqa"), tmp_path / "model", drop=[name])
    measured = ("--perplexity", text_file, "--seqlen", 16, "--out", tmp_path / "eval.json")
    for command in (("calibrate", folder, "-d", tmp_path / "run", "--dataset", text_file), ("eval", folder, *measured)):
        assert f"tensor {name} is missing" in flap(*command, way, code=1).stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize("bias", ["self_attn.o_proj.bias", "self_attn.q_proj.bias", "mlp.down_proj.bias"])
def test_a_bias_that_the_configuration_announces_is_missed(bias, tiny, tmp_path):
    name = f"model.layers.1.{bias}"
    folder = changed(tiny("llama-biases"), tmp_path / "model", drop=[name])
    with pytest.raises(FlapError, match=f"tensor {name} is missing"):
        open_checkpoint(str(folder)).shape  # noqa: B018


def test_a_norm_of_queries_is_missed(tiny, tmp_path):
    name = "model.layers.1.self_attn.q_norm.weight"
    with pytest.raises(FlapError, match=f"tensor {name} is missing"):
        open_checkpoint(str(changed(tiny("qwen3"), tmp_path / "model", drop=[name]))).shape  # noqa: B018


def test_a_tied_matrix_in_the_wrong_place(tiny, tmp_path):
    """Stored as the head alone transformers may find it; flap says that the embedding is missing."""
    source = tiny("llama-tied")
    matrix = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    only_head = changed(
        source, tmp_path / "head", drop=["model.embed_tokens.weight"], **{"lm_head.weight": matrix.clone()}
    )  # fmt: skip
    with pytest.raises(FlapError, match=r"model\.embed_tokens\.weight is missing"):
        open_checkpoint(str(only_head)).shape  # noqa: B018
    same = changed(source, tmp_path / "same", **{"lm_head.weight": matrix.clone()})
    assert open_checkpoint(str(same)).shape.parameters == open_checkpoint(str(source)).shape.parameters
    different = changed(source, tmp_path / "different", **{"lm_head.weight": matrix + 1})
    with pytest.raises(FlapError, match="says that head and embedding are one matrix"):
        open_checkpoint(str(different)).shape  # noqa: B018


def test_an_adapter_beside_weights_is_refused(tiny, flap, text_file, tmp_path):
    folder = shutil.copytree(tiny("llama-gqa"), tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/model"}')
    for way in ("--stream", "--no-stream"):
        said = flap("calibrate", folder, "-d", tmp_path / "run", "--dataset", text_file, way, code=1).stderr
        assert "adapter_config.json" in said
        assert "merge_and_unload" in said


def test_a_quantization_config_on_plain_weights_is_refused(tiny, flap, text_file, tmp_path):
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = changed(tiny("llama-gqa"), tmp_path / "model", config=config)
    for way in ("--stream", "--no-stream"):
        said = flap("calibrate", folder, "-d", tmp_path / "run", "--dataset", text_file, way, code=1).stderr
        assert "is quantised (bitsandbytes: config.json has a quantization_config)" in said


def test_what_transformers_made_up_is_refused(tiny, monkeypatch):
    """Should its reading of a folder ever differ from ours."""
    from flapcli.checkpoints.checkpoint import Checkpoint
    from flapcli.execution.loading import load_model

    checkpoint = open_checkpoint(str(tiny("llama-gqa")))
    monkeypatch.setattr(Checkpoint, "shape", None)
    loading = {"missing_keys": {"model.norm.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (torch.nn.Module(), loading))
    with pytest.raises(FlapError, match=r"finds no weights for 1 tensors: model\.norm\.weight"):
        load_model(checkpoint, torch.float32, torch.device("cpu"))
