"""Every form in which a family is written as GGUF: in a stock llama.cpp against torch, and read back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.edits import edit_keep
from support.families import make_family
from support.pruned import load_pruned

from flapcli.architecture.family import families
from flapcli.architecture.shape import Module
from flapcli.checkpoints import Checkpoint, open_checkpoint
from flapcli.execution.loading import load_model
from flapcli.export import gguf_writer

llamacpp = pytest.importorskip("support.llamacpp", reason="the extra gguf-test brings llama.cpp", exc_type=ImportError)

IDS = torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(0)).tolist()
TIED, PARTIAL = {"tie_word_embeddings": True}, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MUP = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 0.4}
BIASES, PLAIN = {"attention_bias": True, "mlp_bias": True}, {"sliding_window": None}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
# With layers of unlike sizes: the family, the architecture that it is written in, and what its configuration adds.
UNEVEN = [
    ("ernie4_5", "deci", TIED), ("exaone", "deci", {}), ("glm", "deci", {}), ("granite", "deci", {}),
    ("granite", "deci", TIED), ("helium", "deci", {}), ("hyperclovax", "deci", MUP | TIED | {"use_post_norm": False}),
    ("internlm3", "deci", {}), ("iquestcoder", "deci", {}), ("phi3", "deci", {"rope_parameters": PARTIAL}),
    ("seed_oss", "deci", {}), ("qwen3", "openelm", TIED),
]  # fmt: skip
# In the family's own architecture, read again where flap reads it.
OWN = [
    ("arcee", "arcee", {"mlp_bias": False}), ("bloom", "bloom", {}), ("cohere", "command-r", {}),
    ("cohere2", "cohere2", {"num_hidden_layers": 4}), ("gemma", "gemma", {}),
    ("exaone4", "exaone4", PLAIN | {"layer_types": ["full_attention"] * 3}), ("falcon", "falcon", {}),
    ("falcon-7b", "falcon", {}),
    ("gemma2", "gemma2", GEMMA), ("gemma3_text", "gemma3", GEMMA | {"num_hidden_layers": 6}), ("glm4", "glm4", {}),
    ("gpt2", "gpt2", {}), ("gpt_bigcode", "starcoder", {}), ("gpt_bigcode-mha", "starcoder", {}),
    ("gpt_neox", "gptneox", {}), ("gpt_neox-serial", "gptneox", {}), ("granite", "granite", BIASES),
    ("hunyuan_v1_dense", "hunyuan-dense", {}), ("jais2", "jais2", {}), ("llama", "llama", {}),
    ("mpt", "mpt", {"n_heads": 8, "d_model": 64}), ("nemotron", "nemotron", BIASES), ("olmo", "olmo", {}),
    ("olmo2", "olmo2", {"attention_bias": False}), ("olmo3", "olmo2", {"num_hidden_layers": 4}),
    ("phi", "phi2", {}), ("phi3", "phi3", {"rope_parameters": PARTIAL}), ("qwen2", "qwen2", {}),
    ("qwen3", "qwen3", {}), ("smollm3", "smollm3", {"num_hidden_layers": 4}), ("stablelm", "stablelm", {}),
    ("stablelm-parallel", "stablelm", {}), ("starcoder2", "starcoder2", PLAIN),
]  # fmt: skip


def id_of(value):
    return value if isinstance(value, str) else "-".join(map(str, value))[:20]


def difference(gguf: Path, expected: np.ndarray) -> float:
    """The largest of log probabilities after texts of several lengths."""
    assert expected.min() < -6
    loaded = llamacpp.LlamaCpp(gguf, expected.shape[1])
    return max(float(np.abs(loaded.next_logprobs(IDS[:n]) - expected[n - 1]).max()) for n in (1, 2, 10, 60))


class HalfGelu(torch.nn.Module):
    """GELU as llama.cpp has it: looked up in a table of float16, which makes up to 6e-3 in these models."""

    def forward(self, states):
        return torch.nn.functional.gelu(states.half().float(), approximate="tanh").half().float()


def as_in_llamacpp(model):
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, HalfGelu())
    return model


def logprobs(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy()


def test_every_form_is_tried():
    own = {family.gguf.own.architecture for family in families().values() if family.gguf.own}
    assert {architecture for _, architecture, _ in OWN} == own
    rewritten = {name for name, family in families().items() if family.gguf.forms and family.gguf.forms[0].per_layer}
    assert {name for name, _, _ in UNEVEN} | {"llama", "mistral", "qwen2"} == rewritten


@pytest.fixture
def cut(flap, text_file, tmp_path):
    """A folder pruned by a plan in which modules of layers keep units by hand: {(layer, module): those that stay}."""

    def call(dense: Path, ratio: float, keep: dict[tuple[int, Module], str], compensate: str) -> Checkpoint:
        small = ["--dataset", text_file, "--nsamples", "8", "--seqlen", "16", "--dtype", "float32"]
        flap("calibrate", dense, "-d", tmp_path, *small)
        flap("plan", "-d", tmp_path, "--ratio", ratio)
        for place, units in keep.items():
            edit_keep(tmp_path, place, keep=units)
        flap("apply", "-d", tmp_path, "--compensate", compensate)
        return open_checkpoint(str(tmp_path / "pruned"))

    return call


@pytest.mark.parametrize(("name", "architecture", "more"), UNEVEN, ids=id_of)
def test_uneven_layers(name, architecture, more, cut, flap, tmp_path):
    """A layer without heads, one without neurons, one with less of both; biases of compensation where it adds them."""
    dense = make_family(tmp_path / "dense", name, **more)
    emptied = {(0, "attention"): "", (1, "mlp"): ""}
    pruned = cut(dense, 0.3, emptied, "none" if architecture == "openelm" else "bias")
    assert gguf_writer.target(pruned).architecture == architecture
    flap("export", "gguf", "-d", tmp_path, "--outtype", "f32")
    found = difference(tmp_path / "pruned.gguf", logprobs(load_pruned(pruned.path)))
    print(f"{name} {architecture} {found:.1e}")
    assert found < 1e-4


@pytest.mark.parametrize(("name", "architecture", "more"), OWN, ids=id_of)
def test_even_layers(name, architecture, more, cut, flap, tmp_path, monkeypatch):
    """Fewer neurons, and heads where llama.cpp takes fewer; read again where flap reads it."""
    dense = open_checkpoint(str(make_family(tmp_path / "dense", name, **more)))
    form, shape = dense.family.gguf.own, dense.shape
    keep = {"mlp": "0-39"}
    if form.fewer_heads and "attention" in shape.prunable:
        keep["attention"] = "0,2" if shape.units(0, "attention") == 3 else "0,2,3,5"
    places = {(i, module): units for i in range(shape.num_layers) for module, units in keep.items()}
    pruned = cut(dense.path, 0, places, "bias" if form.output_biases else "none")
    monkeypatch.setattr(gguf_writer, "target", lambda checkpoint: checkpoint.family.gguf.own)
    flap("export", "gguf", "-d", tmp_path, "--outtype", "f32")
    found = difference(tmp_path / "pruned.gguf", logprobs(as_in_llamacpp(load_pruned(pruned.path))))
    print(f"{name} {architecture} {found:.1e}")
    assert found < 2e-3
    if form.read:
        sayable = pruned.tensors.keys() == dense.tensors.keys() and "intermediate_size" in dense.family.sizes
        source = pruned if sayable else dense
        flap("export", "gguf", source.path, "-o", tmp_path / "again.gguf", "--outtype", "f32")
        again = open_checkpoint(str(tmp_path / "again.gguf"))
        assert again.tensors.keys() == source.tensors.keys()
        model = load_model(again, torch.float32, torch.device("cpu"))
        np.testing.assert_allclose(logprobs(model), logprobs(load_pruned(source.path)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "plan", "compensate", "reason"),
    [
        ("gpt2", {}, "UL-UM --ratio 0.3", "bias", "gpt2 can't do with fewer heads (`flap plan --structure UL-MM"),
        ("smollm3", {}, "UL-MM --remove-heads 0 --ratio 0.2", "bias", "adds no biases of output projections"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "UL-UM --ratio 0", "none", "layer_types does not repeat"),
    ],
    ids=id_of,
)
def test_what_has_no_form_is_told_what_to_plan(name, more, plan, compensate, reason, prune, flap, tmp_path):
    dense = make_family(tmp_path / "dense", name, **more)
    prune(dense, tmp_path / "run", f"--structure {plan}", f"--compensate {compensate}")
    assert reason in flap("export", "gguf", "-d", tmp_path / "run", code=1).stderr
    assert not (tmp_path / "run" / "pruned.gguf").exists()
