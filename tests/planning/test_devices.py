"""`flap plan --tensor-parallel N`: every layer splits over N devices by vLLM's rule, and apply says over how many."""

import json
from math import gcd

import pytest

from flapcli.architecture.parallel import device_counts
from flapcli.architecture.shape import LayerShape, ModelShape
from flapcli.artifacts.plan import load_plan
from flapcli.errors import UsageError
from flapcli.planning.allocation import Request
from flapcli.planning.devices import over_devices


def vllm_takes(heads, keys, devices):
    """What vLLM's QKVParallelLinear asserts of a layer (vllm 0.32.0, model_executor/layers/linear.py)."""
    return heads % devices == 0 and (devices % keys if devices >= keys else keys % devices) == 0


def shape_of(heads, keys, width=4096):
    return ModelShape(
        name="m", fingerprint="0", family="llama", num_layers=2, hidden_size=64, intermediate_size=width,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=8, parameters=10**6, mlp_projections=3,
        unit_biases={"attention": 0, "mlp": 0}, layers=(LayerShape(heads, keys, width),) * 2,
    )  # fmt: skip


@pytest.mark.parametrize("devices", [2, 4, 8, 16])
def test_all_multiples_split_or_no_number_does(devices):
    for keys in range(1, 13):
        for share in range(1, 9):
            for unit in ("kv_group", "query_head") if keys > 1 and share > 1 else ("kv_group",):
                shape = shape_of(keys * share, keys).with_attention_unit(unit)
                most = keys if unit == "kv_group" else share

                def sizes(count, unit=unit, keys=keys, share=share):
                    return (count * share, count) if unit == "kv_group" else (count * keys, keys)

                takes = [n for n in range(1, most + 1) if vllm_takes(*sizes(n), devices)]
                try:
                    found = over_devices(shape, Request("AL-AM", 0.3, round_to=24, tensor_parallel=devices))
                except UsageError as error:
                    assert not takes, (keys, share, unit)
                    assert f"--tensor-parallel {devices}: no number of m's attention heads splits over them" in str(
                        error
                    )
                    continue
                assert {*range(found.heads_multiple_of, most + 1, found.heads_multiple_of)} <= {*takes}
                assert found.round_to % (16 * devices) == found.round_to % 24 == 0


@pytest.mark.parametrize(
    ("layers", "counts"),
    [
        ([(6, 3, 56)], [1]),
        ([(8, 8, 96), (4, 4, 64)], [1, 2, 4]),  # of gcd(8, 4, 96, 64) = 4 its divisors
        ([(12, 4, 64), (6, 2, 32)], [1, 2]),
        ([(8, 2, 64), (4, 1, 32)], [1, 2, 4]),  # 4 devices: a copy of each key/value head on two, or four
        ([(12, 3, 24), (8, 2, 24)], [1]),  # two devices can't share three key/value heads, nor four
        ([(4, 4, 0), (0, 0, 6)], [1, 2]),  # what a layer does not have splits
        ([(0, 0, 0)], [1]),
        ([(4, 4, 8, 6, 5, 10)], [1, 2]),  # experts and a shared one beside them
    ],
)
def test_over_how_many_devices_layers_split(layers, counts):
    assert device_counts(LayerShape(*layer) for layer in layers) == counts


@pytest.fixture(scope="module")
def calibrated(tiny, prune, tmp_path_factory):
    return prune(tiny("llama-gqa"), tmp_path_factory.mktemp("devices") / "run")  # 6 heads, 3 KV groups, 56 neurons


@pytest.mark.parametrize(
    ("options", "devices", "head_step", "width_step"),
    [
        ("--tensor-parallel 2", 2, 2, 32),
        ("--tensor-parallel 2 --structure UL-UM --ratio 0.4", 2, 2, 32),
        ("--tensor-parallel 3 --heads-multiple-of 3 --round-to 24", 3, 3, 48),
        ("--tensor-parallel 3 --attention-unit query_head", 3, 1, 48),
    ],
)
def test_layers_split(calibrated, flap, tmp_path, options, devices, head_step, width_step):
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    flap("plan", "-d", calibrated, "--out", plan, *options.split())
    settings = load_plan(plan).settings
    assert (settings["tensor_parallel"], settings["heads_multiple_of"], settings["round_to"]) == (
        devices, head_step, width_step,
    )  # fmt: skip
    apply = ("apply", "-d", calibrated, "--plan", plan, "--stats", calibrated / "stats.safetensors", "--out", out)
    shown = flap(*apply).stdout.rstrip().splitlines()[-1]
    said = json.loads(flap(*apply, "--json").stdout)["tensor_parallel"]
    flap_section = json.loads((out / "config.json").read_text())["flap"]
    heads, keys, widths = (
        flap_section[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    )
    assert all(size % devices == 0 for size in heads + widths)
    common = gcd(*heads, *widths)
    by_hand = [
        n
        for n in range(1, common + 1)
        if common % n == 0 and all(vllm_takes(h, k, n) for h, k in zip(heads, keys, strict=True))
    ]
    assert said == by_hand
    assert devices in said
    assert shown == f"tensor parallel sizes that divide every layer: {', '.join(map(str, said))}"
    assert f"| tensor parallel sizes that divide every layer | {', '.join(map(str, said))} |" in (
        (out / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tensor-parallel 4", "keeps neurons in multiples of 64, and layer 0, mlp of"),
        ("--tensor-parallel 2 --round-to 3", "--tensor-parallel 2 with --round-to 3 keeps neurons in multiples of 96"),
        ("--tensor-parallel 2 --heads-multiple-of 3", "attention heads in multiples of --heads-multiple-of 3 splits"),
        ("--tensor-parallel 2 --attention-unit query_head", "layers have 6 heads, 3 key/value heads"),
        ("--tensor-parallel 2 --allow-empty", "leave --allow-empty out"),
        ("--tensor-parallel 2 --method depth", "leave --tensor-parallel out"),
    ],
)
def test_what_can_not_be_split_is_refused(calibrated, flap, options, words):
    before = (calibrated / "plan.yaml").read_bytes()
    assert b"tensor_parallel" not in before  # plans without it are as those of older versions
    said = flap("plan", "-d", calibrated, *options.split(), code=2).stderr
    assert said.count("\n") == 1
    assert words in said
    assert (calibrated / "plan.yaml").read_bytes() == before
