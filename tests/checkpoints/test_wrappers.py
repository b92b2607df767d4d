"""Models of several kinds of input: the text model is pruned, all else is carried over, and the whole loads again."""

import copy
import json
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from support.edits import edit_keep, even_plan
from support.families import save_random
from support.pruned import CLOSE, IDS, load_pruned, logits, masked_dense, step_by_step
from transformers import AutoConfig, AutoModelForImageTextToText

from flapcli.architecture.wrapper import wrappers
from flapcli.checkpoints import open_checkpoint
from flapcli.execution.loading import load_model

SMALL = ["--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]
TEXT = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TOWER = {"depth": 1, "num_heads": 2, "patch_size": 14}


def pair(text, vision, **more):
    return {"text_config": TEXT | text, "vision_config": vision} | more


# By name: the model_type, and what its configuration is made with.
WHOLES = {
    "gemma3": ("gemma3", pair({"model_type": "gemma3_text", "sliding_window": 5, "query_pre_attn_scalar": 8},
                              VISION | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4)),
    "mistral3": ("mistral3", pair({"model_type": "mistral"}, VISION | {"model_type": "pixtral"})),
    "mistral3-ministral3": ("mistral3", pair({"model_type": "ministral3"}, VISION | {"model_type": "pixtral"})),
    "llava": ("llava", pair({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"},
                            image_token_index=319)),
    "llava_next": ("llava_next", pair({"model_type": "mistral"}, VISION | {"model_type": "clip_vision_model"})),
    "qwen2_vl": ("qwen2_vl", pair(SECTIONS, TOWER | {"embed_dim": 32, "hidden_size": 48})),
    "qwen2_5_vl": ("qwen2_5_vl", pair(SECTIONS, TOWER | {"hidden_size": 32, "out_hidden_size": 48,
                                                         "intermediate_size": 40})),
    "qwen2_5_vl-flat": ("qwen2_5_vl", pair(SECTIONS, TOWER | {"hidden_size": 32, "out_hidden_size": 48,
                                                              "intermediate_size": 40})),
    "internvl": ("internvl", pair({"model_type": "qwen2"}, VISION | {"image_size": [28, 28], "patch_size": [14, 14]})),
    "llava_onevision": ("llava_onevision", pair({"model_type": "qwen2"},
                                                VISION | {"model_type": "siglip_vision_model"})),
    "idefics3": ("idefics3", pair({"model_type": "llama"}, VISION)),
    "smolvlm": ("smolvlm", pair({"model_type": "llama"}, VISION)),
    "qwen3_vl": ("qwen3_vl", pair(SECTIONS, TOWER | {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 40,
                                                     "deepstack_visual_indexes": [0]})),
}  # fmt: skip


FORMS = ["gemma3", "llava", "qwen2_vl", "qwen2_5_vl-flat", "smolvlm"]  # those that differ in names or configuration


@pytest.fixture(scope="module")
def build(tmp_path_factory, flap, text_file):
    """Of a name in WHOLES: the dense whole, and a run folder with statistics and an uneven plan of its text model."""
    return cache(lambda name: _build(tmp_path_factory.mktemp(name), name, flap, text_file))


@pytest.fixture(params=WHOLES)
def made(request, build):
    return build(request.param)


@pytest.fixture(params=FORMS)
def form(request, build):
    return build(request.param)


def _build(folder, name, flap, text_file):
    kind, settings = WHOLES[name]
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **copy.deepcopy(settings)))
    dense, run = save_random(whole, folder / "dense"), folder / "run"
    if name.endswith("-flat"):
        flatten(dense / "config.json")
    flap("calibrate", dense, "-d", run, "--dataset", text_file, *SMALL)
    flap("plan", "-d", run, "--ratio", "0.3")
    edit_keep(run, (0, "attention"), keep="0")
    edit_keep(run, (2, "attention"))
    flap("apply", "-d", run)
    return dense, run


def flatten(path):
    """config.json as Qwen's are on the hub: the text model's keys among all others, and its rotation as of old."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    path.write_text(json.dumps(text | config))


def others(model):
    """Tensors of other parts than the text model."""
    return {
        name: t for name, t in model.state_dict().items() if not re.search("language_model|text_model|lm_head", name)
    }


def test_every_description_has_a_model():
    assert {kind for kind, _ in WHOLES.values()} == set(wrappers())


def test_the_text_model_computes_what_the_whole_does(made):
    """Without pictures; it is of another class, by which it is calibrated and measured."""
    dense, _ = made
    checkpoint, model = open_checkpoint(str(dense)), load_pruned(dense)
    text = load_model(checkpoint, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits(text), logits(model), rtol=1e-6, atol=1e-6)
    assert checkpoint.shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(others(model)) > 10


def test_sliced_equals_masked_in_the_whole(made):
    """All else is there bit for bit; and the text model of the pruned whole, of its own class, computes the same."""
    dense, run = made
    sliced, expected = load_pruned(run / "pruned"), masked_dense(dense, run)
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    torch.testing.assert_close(step_by_step(sliced), logits(sliced)[:, 4:], **CLOSE)
    text = load_model(open_checkpoint(run / "pruned"), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(logits(text), logits(sliced), rtol=1e-6, atol=1e-6)
    kept, before = others(sliced), others(expected)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


def test_pictures_go_through_what_was_pruned(build):
    dense, run = build("llava")
    ids = torch.tensor([[5, 17, 319, 319, 319, 319, 64, 12]])  # four patches between words
    picture = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [
            model(ids, pixel_values=picture).logits for model in (load_pruned(run / "pruned"), masked_dense(dense, run))
        ]
        without = load_pruned(run / "pruned")(ids).logits
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert (found[0] - without).abs().max() > 1e-2


def test_perplexity_in_memory_and_streamed(form, flap, text_file):
    _, run = form
    small = ["--perplexity", text_file, "--seqlen", "32", "--dtype", "float32", "--json", "-o", run / "e.json"]
    found = json.loads(flap("eval", run / "pruned", *small, "--stream").stdout)
    again = json.loads(flap("eval", run / "pruned", *small, "--no-stream").stdout)
    for one, other in ((found, again), (found["baseline"], again["baseline"])):
        assert one["perplexity"][str(text_file)] == pytest.approx(other["perplexity"][str(text_file)], rel=1e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_the_text_model_as_gguf(name, build, flap, tmp_path):
    """Alone, in a stock llama.cpp; or refused as its family is, for layers of unlike sizes or Mistral's window."""
    why = "the extra gguf-test brings llama.cpp"
    llamacpp = pytest.importorskip("support.llamacpp", reason=why, exc_type=ImportError)
    _, run = build(name)
    written = name != "gemma3"
    asked = ["export", "gguf", "-d", run, "-o", tmp_path / "x.gguf", "--outtype", "f32"]
    assert "can't be exported to GGUF" in flap(*asked, code=not written).stderr or written
    if written:
        expected = logits(load_pruned(run / "pruned"))[0, -1].log_softmax(-1).numpy()
        found = llamacpp.LlamaCpp(tmp_path / "x.gguf", 320).next_logprobs(IDS[0].tolist())
        assert abs(found - expected).max() < 1e-4


def test_even_is_stock_where_its_configuration_can_say_it(form, flap, tmp_path):
    """Of the class that transformers has of the whole; biases of compensation are another matter than sizes."""
    dense, run = form
    even_plan(run, tmp_path, flap)
    (tmp_path / "stats.safetensors").write_bytes((run / "stats.safetensors").read_bytes())
    flap("apply", "-d", tmp_path, "--compensate", "none")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert ("auto_map" in config) == config["model_type"].startswith("qwen2")
    sliced = load_pruned(tmp_path / "pruned")
    torch.testing.assert_close(logits(sliced), logits(masked_dense(dense, tmp_path, bias=False)), **CLOSE)
    _, told = type(sliced).from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_whole_layers_and_a_second_round(form, flap, tmp_path, text_file):
    """Layers are dropped in the whole's configuration too, and what was pruned is pruned again."""
    _, run = form
    flap("plan", "-d", run, "--out", tmp_path / "plan.yaml", "--method", "depth", "--ratio", "0.3")
    (tmp_path / "stats.safetensors").write_bytes((run / "stats.safetensors").read_bytes())
    flap("apply", "-d", tmp_path)
    assert open_checkpoint(tmp_path / "pruned").shape.num_layers == 2
    first = load_pruned(tmp_path / "pruned")
    flap("calibrate", run / "pruned", "-d", tmp_path / "again", "--dataset", text_file, *SMALL)
    flap("plan", "-d", tmp_path / "again", "--ratio", "0.3")
    flap("apply", "-d", tmp_path / "again")
    sliced, expected = load_pruned(tmp_path / "again" / "pruned"), masked_dense(run / "pruned", tmp_path / "again")
    torch.testing.assert_close(logits(sliced), logits(expected), **CLOSE)
    assert first.config.get_text_config().num_hidden_layers == 2


def test_a_description_is_tried(form, flap):
    found = json.loads(flap("families", "--check", form[0], "--json").stdout)
    assert all(row["difference"] < 1e-4 for row in found["layers"])


def test_names_of_both_ages(form, tmp_path):
    """Files have the text model under language_model.model, or, by class, under model.language_model."""
    dense, _ = form
    expected = open_checkpoint(str(dense))
    for path in dense.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    there = {name: tensor.clone() for name, tensor in load_pruned(dense).state_dict().items()}
    save_file(there, tmp_path / "model.safetensors", {"format": "pt"})
    read = open_checkpoint(str(tmp_path))
    assert read.shape.parameters == expected.shape.parameters
    assert read.tensors == expected.tensors
    assert all(torch.equal(read.read(name), expected.read(name)) for name in expected.tensors)


def test_a_process_without_flap_loads_the_whole(build, tmp_path):
    """By the class in `auto_map`, its pictures' part too."""
    _, run = build("gemma3")
    code = (
        "import sys; sys.modules['flapcli'] = None\n"
        "import torch; from transformers import AutoModelForImageTextToText as Auto\n"
        f"model = Auto.from_pretrained({str(run / 'pruned')!r}, trust_remote_code=True, dtype=torch.float32).eval()\n"
        f"with torch.no_grad(): torch.save(model(torch.arange(8)[None]).logits, {str(tmp_path / 'l.pt')!r})\n"
        "assert model.get_image_features(torch.zeros(1, 3, 28, 28)).pooler_output is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        torch.load(tmp_path / "l.pt"), logits(load_pruned(run / "pruned"), torch.arange(8)[None]), **CLOSE
    )
