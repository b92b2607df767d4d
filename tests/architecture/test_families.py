"""`flap families`: the table, and a description tried on a checkpoint."""

import json

import pytest
from support.families import FAMILY_CONFIGS, make_family

from flapcli.architecture import family as descriptions
from flapcli.architecture.source import sources
from flapcli.architecture.wrapper import wrappers


def test_the_table_names_every_description(flap):
    rows = json.loads(flap("families", "--json").stdout)
    assert {row["family"] for row in rows} == {kind for kind, _ in FAMILY_CONFIGS.values()} | {*sources(), *wrappers()}
    assert len(rows) >= 45
    whole = next(row for row in rows if row["family"] == "olmo2")
    assert whole["prunable"] == "mlp" and "attention stays whole" in whole["notes"]
    llama = next(row for row in rows if row["family"] == "llama")
    assert (llama["unit"], llama["stock_when_even"], llama["gguf"]) == (
        "kv_group, query_head",
        "heads, neurons",
        "deci",
    )
    shown = flap("families").stdout
    assert all(row["family"][:6] in shown for row in rows)


@pytest.mark.parametrize(
    "name", ["gpt2", "falcon-7b", "bloom", "phi3", "gemma3_text", "opt", "olmo2", "minicpm3", "mixtral", "qwen2_moe"]
)
def test_a_description_is_tried_on_a_checkpoint(name, flap, tmp_path):
    found = json.loads(flap("families", "--check", make_family(tmp_path / "dense", name), "--json").stdout)
    assert [row["layer"] for row in found["layers"]] == [0, 2]
    assert all(row["difference"] < 1e-4 for row in found["layers"])


def test_a_description_that_does_not_fit_fails(flap, tmp_path, monkeypatch):
    """GPT-NeoX's rows are interleaved head by head: the same sizes in blocks pass the headers, and not the layers."""
    dense = make_family(tmp_path / "dense", "gpt_neox")
    read = descriptions._description

    def blocks(name):
        own, variants = read(name)
        attention = own["attention"] | {"producers": {"attention.query_key_value": [["q"], ["k"], ["v"]]}}
        return own | {"attention": attention}, variants

    monkeypatch.setattr(descriptions, "_description", blocks)
    told = flap("families", "--check", dense, code=1).stderr
    assert "its description does not fit" in told


def test_an_unknown_family_is_told_what_to_add(flap, tmp_path, text_file):
    dense = make_family(tmp_path / "dense", "llama")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "llamb"}))
    told = flap("calibrate", dense, "-d", tmp_path, "--dataset", text_file, code=1).stderr
    assert "llamb" in told and "architecture/families" in told.replace("\n", "")
