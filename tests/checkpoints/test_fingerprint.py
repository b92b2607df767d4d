"""Two configurations have one fingerprint exactly where the same weights compute the same by them."""

import json
import shutil
from contextlib import suppress

import pytest

from flapcli.checkpoints import open_checkpoint
from flapcli.errors import FlapError

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
WRAPPED = {"text_config": {"attn_logit_softcapping": 50.0, "dtype": "float32", "vision_config": {"depth": 3}}}


@pytest.fixture(scope="module")
def fingerprint(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny("llama-gqa"), tmp_path_factory.mktemp("model") / "model")
    plain = json.loads((folder / "config.json").read_text())

    def of(changes, **layout):
        (folder / "config.json").write_text(json.dumps(plain | changes, **layout))
        return open_checkpoint(str(folder)).fingerprint

    return of


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"final_logit_softcapping": 30.0}),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 50.0}),
        ({"logit_scale": 0.0625}, {"logit_scale": 0.25}),
        ({"residual_multiplier": 0.22}, {"residual_multiplier": 0.24}),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}),
        ({"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 224}),
        ({"no_rope_layers": [1, 1, 0]}, {"no_rope_layers": [1, 0, 1]}),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN | {"factor": 8.0}}),
        ({"rope_parameters": {"full_attention": YARN}}, {"rope_parameters": {"full_attention": YARN | {"factor": 8}}}),
        ({"rope_parameters": YARN}, {"rope_parameters": YARN, "max_position_embeddings": 512}),
        ({"rope_scaling": {"type": "dynamic"}}, {"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 512}),
        (WRAPPED, {"text_config": WRAPPED["text_config"] | {"attn_logit_softcapping": None}}),
        (WRAPPED, {"text_config": WRAPPED["text_config"] | {"vision_config": {"depth": 4}}}),
        ({}, {"a key that nobody knows": 1}),
        ({}, {"flap": {"made_by": "another plan"}}),
    ],
)
def test_what_may_change_the_function_counts(before, after, fingerprint):
    assert fingerprint(before) != fingerprint(after)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16", "torch_dtype": "bfloat16"},
        {"transformers_version": "4.40.0", "_name_or_path": "/tmp/x", "architectures": None, "use_cache": False},
        {"auto_map": {"AutoConfig": "configuration_x.XConfig"}},
        {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": None, "unk_token_id": 3},
        {"initializer_range": 0.5, "attention_dropout": 0.1, "embd_pdrop": 0.1, "hidden_dropout_prob": 0.2},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "output_attentions": True},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "repetition_penalty": 1.1},
        {"max_position_embeddings": 512},
        {"text_config": WRAPPED["text_config"] | {"dtype": "float16", "use_cache": True}},
    ],
)
def test_what_never_does_is_left_out(changes, fingerprint):
    base = WRAPPED if "text_config" in changes else {}
    assert fingerprint(base) == fingerprint(base | changes)


def test_neither_order_nor_layout_counts(fingerprint):
    changes = {"b": {"y": 1, "x": 2}, "a": 1e-5}
    one = fingerprint(changes, indent=2)
    assert one == fingerprint({"a": 0.00001, "b": {"x": 2, "y": 1}}) == fingerprint(changes, sort_keys=True)


def test_a_configuration_too_deep_to_read_is_refused(tiny, tmp_path):
    """Wherever Python's patience ends: in reading it, or in what is made of it."""
    folder = shutil.copytree(tiny("llama-gqa"), tmp_path / "model")
    plain = (folder / "config.json").read_text().rstrip().removesuffix("}")
    for depth in range(400, 1100, 20):
        deep = '{"inner_config": ' * depth + "{}" + "}" * depth
        (folder / "config.json").write_text(f'{plain}, "inner_config": {deep}}}')
        with suppress(FlapError):
            open_checkpoint(str(folder)).fingerprint  # noqa: B018
