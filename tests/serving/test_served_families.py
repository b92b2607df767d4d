"""One unevenly pruned random model of every family, served by vLLM's Transformers backend, or refused as known."""

import json
import random

import pytest
from support.edits import edit_keep
from support.families import FAMILY_CONFIGS, make_family
from support.pruned import greedy, load_served
from support.vllm import Engine

pytestmark = pytest.mark.serving
COUNT = 32  # tokens
# vLLM's attention on CPUs takes heads of multiples of 32; there are 6.
WIDE = dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 192) | dict.fromkeys(
    ["head_dim", "query_pre_attn_scalar"], 32
)
FAMILIES = [name for name in FAMILY_CONFIGS if "-" not in name]
# What vLLM 0.32 says of those that it can't serve, by its reason; one that it serves after all fails here.
REASONS = {
    "does not recognize this architecture": "exaone internlm3 iquestcoder",  # its transformers is 5.19
    "vLLM can't serve experts that are pruned unevenly": "gpt_oss granitemoe llama4_text minimax_m2 mixtral olmoe "
    "phimoe qwen2_moe qwen3_moe",
    "Heterogeneous MLA models are not supported": "deepseek_v2 deepseek_v3",
    "is not supported by MLA": "minicpm3",
    "Argument position_ids not found in the forward method": "bloom mpt",
    "KeyError: 'vllm'": "falcon gptj",  # which do not ask transformers for an implementation of attention
    "does not dispatch through the Transformers attention interface": "xglm",
    "Following weights were not initialized from checkpoint": "gpt2",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}


@pytest.fixture(scope="module")
def prompts():
    chosen = random.Random(0)
    return [[chosen.randrange(3, 300) for _ in range(length)] for length in (3, 8, 13, 20)]


@pytest.fixture
def pruned(prune, tmp_path):
    """A pruned folder of a family, in heads of a size that vLLM takes."""

    def get(name, *options):
        wide = {key: size for key, size in WIDE.items() if key in FAMILY_CONFIGS[name][1]}
        return prune(make_family(tmp_path / "dense", name, **wide), tmp_path / "run", *options) / "pruned"

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, pruned, prompts, same_tokens):
    folder = pruned(name)
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    expected = greedy(load_served(folder), prompts, COUNT)
    same_tokens(f"{name}, uneven, biases", folder, prompts, expected, refused=REFUSED.get(name))


def test_emptied_modules(pruned, prompts, same_tokens, flap, with_plugin):
    run = pruned("llama").parent
    edit_keep(run, (1, "attention"), (2, "mlp"))
    flap("apply", "-d", run)
    expected = greedy(load_served(run / "pruned"), prompts, COUNT)
    same_tokens("llama, an emptied attention, an emptied MLP", run / "pruned", prompts, expected)
    same_tokens("the same, by the plugin", run / "pruned", prompts, expected, engine=with_plugin)


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory):
    engine = Engine(tmp_path_factory.mktemp("plugin") / "log", "flap")
    yield engine
    engine.close()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_plugin_serves_by_vllms_own_layers(name, pruned, prompts, same_tokens, with_plugin):
    folder = pruned(name)
    expected = greedy(load_served(folder), prompts, COUNT)
    found = same_tokens(f"{name}, uneven, biases, by the plugin", folder, prompts, expected, engine=with_plugin)
    assert found["served_by"].startswith("Flap")


def test_stock_qwen2_of_fewer_heads_is_not_for_vllms_own_class(pruned, prompts, same_tokens):
    """Which takes a head's size for the hidden size by the heads."""
    folder = pruned("qwen2", "--ratio 0.4 --structure UL-UM", "--compensate none")
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and config["num_attention_heads"] < 6
    expected = greedy(load_served(folder), prompts, COUNT)
    same_tokens("qwen2, even, stock", folder, prompts, expected, refused="exceeds dimension size")
    same_tokens("the same, --model-impl transformers", folder, prompts, expected, model_impl="transformers")
