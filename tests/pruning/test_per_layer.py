"""What config.json says of layers in transformers' own words, by which vLLM sizes them."""

import json

import pytest
import torch
from support.models import FEW
from support.pruned import CLOSE, IDS, load_pruned
from transformers import AutoConfig, AutoModel

from flapcli.architecture.family import PER_LAYER
from flapcli.artifacts.plan import load_plan

SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@pytest.fixture(scope="module", params=FEW)
def uneven(request, tiny, prune, tmp_path_factory):
    return prune(tiny(request.param), tmp_path_factory.mktemp("run") / request.param, "--ratio 0.4")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_layer_has_its_sizes(uneven):
    config = AutoConfig.from_pretrained(uneven / "pruned")
    flap, plan = config_of(uneven / "pruned")["flap"], load_plan(uneven / "plan.yaml")
    for i, layer in enumerate(config.per_layer_config):
        found = [getattr(layer, size) for size in SIZES]
        assert found == [flap[size][i] for size in SIZES]
        assert found[2] == len(plan.kept(i, "mlp"))
        assert layer.head_dim == config.head_dim


def test_the_model_without_its_head(uneven):
    """Named in auto_map, of the same shapes, and the same hidden states."""
    folder = uneven / "pruned"
    config = AutoConfig.from_pretrained(folder)
    made = AutoModel.from_config(config, trust_remote_code=True)
    whole, bare = load_pruned(folder), AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(bare).__name__.startswith("Flap")
    shapes = {name: p.shape for name, p in bare.named_parameters()}
    assert {name: p.shape for name, p in made.named_parameters()} == shapes
    with torch.no_grad():
        torch.testing.assert_close(bare.eval()(IDS)[0], whole.base_model(IDS)[0], **CLOSE)


def test_a_second_round_and_a_stock_folder_write_it_anew(tiny, prune, tmp_path):
    none = "--compensate none"
    first = prune(tiny("llama-gqa"), tmp_path / "first", "--ratio 0.3", none)
    again = prune(first / "pruned", tmp_path / "again", "--ratio 0.3", none)
    before, after = config_of(first / "pruned"), config_of(again / "pruned")
    assert after["per_layer_config"] != before["per_layer_config"]
    for place, sizes in after["per_layer_config"].items():
        assert sizes == {size: after["flap"][size][int(place)] for size in sizes}
    alone = prune(first / "pruned", tmp_path / "alone", "--method depth --ratio 0.6", none)
    found = config_of(alone / "pruned")
    assert found["num_hidden_layers"] == 1
    assert {*PER_LAYER, "auto_map"}.isdisjoint(found)
