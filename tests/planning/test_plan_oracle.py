"""`flap plan` keeps the units that METHOD.md says, by an independent reading of it in plain loops."""

import itertools
import random

import numpy as np
import pytest

from flapcli.architecture.shape import LayerShape, ModelShape
from flapcli.artifacts.plan import StatsRef
from flapcli.artifacts.stats import Calibration, ModuleStats, Stats, StatsHeader
from flapcli.planning.allocation import Request
from flapcli.planning.methods import choose

L, H, D, F, SIZE = 4, 8, 4, 80, 32  # layers, query heads, head_dim, intermediate_size, hidden_size
ROWS = SIZE


def random_stats(kv_heads: int, projections: int, seed: int) -> tuple[Stats, list[dict[str, list[list[float]]]]]:
    """Statistics of a random model, and the raw activations' moments and weights that they come from."""
    rng = np.random.default_rng(seed)
    raw, modules, fisher = [], {}, {}
    for layer in range(L):
        values = {}
        for module, channels in (("attention", H * D), ("mlp", F)):
            weight = rng.normal(size=(ROWS, channels)) * rng.uniform(0.5, 2, channels)
            x = rng.normal(size=(50, channels)) * rng.uniform(0.1, 3, channels) + rng.normal(size=channels)
            gradients = rng.normal(size=(50, channels)) * rng.uniform(0.1, 3, channels)
            values[module] = {"weight": weight.tolist(), "x": x.tolist(), "gradients": gradients.tolist()}
            units = kv_heads if module == "attention" else F
            gates = (x * gradients).reshape(50, units, -1).sum(-1)
            fisher[layer, module] = (gates**2).mean(0).astype(np.float32)
            modules[layer, module] = ModuleStats(
                mean=x.mean(0).astype(np.float32),
                variance=x.var(0, ddof=1).astype(np.float32),
                square_mean=(x**2).mean(0).astype(np.float32),
                weight_square_sum=(weight**2).sum(0).astype(np.float32),
                weight_abs_mean=np.abs(weight).mean(0).astype(np.float32),
            )
        raw.append(values)
    shape = ModelShape(
        name="random", fingerprint="0", family="llama", num_layers=L, hidden_size=SIZE, intermediate_size=F,
        num_attention_heads=H, num_key_value_heads=kv_heads, head_dim=D, parameters=10**6,
        mlp_projections=projections, unit_biases={"attention": 0, "mlp": 0},
        layers=tuple(LayerShape(H, kv_heads, F) for _ in range(L)),
    )  # fmt: skip
    calibration = Calibration(dataset="random", nsamples=1, seqlen=50, seed=seed, tokens=50, dtype="float32")
    return Stats(
        StatsHeader(model=shape, calibration=calibration, settings={}, versions={}), modules, fisher=fisher
    ), raw


def channel_scores(metric: str, values: dict[str, list[list[float]]]) -> list[float]:
    """METHOD.md, Metrics and Baselines, one channel at a time."""
    weight, x = values["weight"], values["x"]
    scores = []
    for j in range(len(weight[0])):
        column = [row[j] for row in weight]
        seen = [row[j] for row in x]
        mean = sum(seen) / len(seen)
        variance = sum((v - mean) ** 2 for v in seen) / (len(seen) - 1)
        square_mean = sum(v * v for v in seen) / len(seen)
        scores.append(
            {
                "IFV": variance,
                "WIFV": variance * sum(w * w for w in column),
                "WIFN": sum(abs(w) for w in column) / len(column) * square_mean**0.5,
                "magnitude": sum(w * w for w in column) ** 0.5,
            }[metric]
        )
    return scores


def oracle(raw, metric, structure, p, remove_heads, kv_heads, projections, exponent):
    """Kept units of every module as METHOD.md's Structures read, with whole KV groups as units of attention."""
    g = H // kv_heads
    head_cost, neuron_cost = (2 * g + 2) * SIZE * D, projections * SIZE
    attention, mlp = [], []
    for values in raw:
        a = [s**exponent for s in channel_scores(metric, values["attention"])]
        m = channel_scores(metric, values["mlp"])
        if structure.startswith("AL"):
            a, m = standardised(a), standardised(m)
        groups = [a[k * g * D : (k + 1) * g * D] for k in range(kv_heads)]
        attention.append([sum(group) / (len(group) if structure.startswith("AL") else 1) for group in groups])
        mlp.append(m)
    removed = {(i, m): set() for i in range(L) for m in ("attention", "mlp")}

    def remove_lowest(scores, module, layers, count):
        candidates = sorted((scores[i][k], i, k) for i in layers for k in range(len(scores[i])))
        best = {i: max(range(len(scores[i])), key=lambda k, i=i: scores[i][k]) for i in layers}
        candidates = [(s, i, k) for s, i, k in candidates if best[i] != k]  # one unit stays in every module
        for _, i, k in candidates[:count]:
            removed[i, module].add(k)

    per_layer = kv_heads * head_cost + F * neuron_cost
    if structure == "UL-UM":
        for i in range(L):
            remove_lowest(attention, "attention", [i], int(p * kv_heads))
            remove_lowest(mlp, "mlp", [i], int(p * F))
    elif structure == "UL-MM":
        for i in range(L):
            remove_lowest(attention, "attention", [i], remove_heads // L)
            remove_lowest(mlp, "mlp", [i], int((p * per_layer - head_cost * (remove_heads // L)) / neuron_cost))
    elif structure == "AL-MM":
        remove_lowest(attention, "attention", range(L), remove_heads)
        remove_lowest(mlp, "mlp", range(L), int((L * p * per_layer - head_cost * remove_heads) / neuron_cost))
    else:
        pool = [(s, 0, i, k, head_cost, "attention") for i in range(L) for k, s in enumerate(attention[i])]
        pool += [(s, 1, i, k, neuron_cost, "mlp") for i in range(L) for k, s in enumerate(mlp[i])]
        pool.sort()
        gone = 0.0
        for n, (_, _, i, k, cost, module) in enumerate(pool):
            if gone >= p * L * per_layer:
                break
            if not any(other[2] == i and other[5] == module for other in pool[n + 1 :]):
                continue  # the last and best of its module stays
            removed[i, module].add(k)
            gone += cost
    units = {"attention": kv_heads, "mlp": F}
    return {key: [k for k in range(units[key[1]]) if k not in gone] for key, gone in removed.items()}


def standardised(scores: list[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    std = (sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5
    return [(s - mean) / std for s in scores]


FLAP = [("flap", m, s) for m, s in itertools.product(("IFV", "WIFV", "WIFN"), ("UL-UM", "UL-MM", "AL-MM", "AL-AM"))]
BASELINES = [("wanda-sp", "WIFN", "UL-UM"), ("mag-sp", "magnitude", "UL-UM")]


@pytest.mark.parametrize("kv_heads", [8, 4, 2], ids=["mha", "gqa2", "gqa4"])
@pytest.mark.parametrize(("method", "metric", "structure"), FLAP + BASELINES)
@pytest.mark.parametrize("projections", [3, 2], ids=["gated", "ungated"])
def test_kept_units_equal_the_oracle(method, metric, structure, kv_heads, projections):
    draw = random.Random(f"{method}{metric}{structure}{kv_heads}{projections}")
    for seed in range(4):
        stats, raw = random_stats(kv_heads, projections, seed)
        p = draw.choice([0.1, 0.25, 0.3, 0.5])
        remove_heads = draw.randint(0, L * kv_heads // 8) if structure.endswith("MM") else None
        exponent = 2.0 if method == "flap" else 1.0
        request = Request(structure, p, remove_heads)
        plan = choose(stats, StatsRef(path="s", sha256="0"), method, metric, request, exponent)
        expected = oracle(raw, metric, structure, p, remove_heads, kv_heads, projections, exponent)
        found = {(i, m): plan.kept(i, m).tolist() for i in range(L) for m in ("attention", "mlp")}
        assert found == expected
        total = L * (kv_heads * plan.parameters.per_unit["attention"].weights + F * projections * SIZE)
        assert plan.parameters.prunable == total


def fisher_scores(values, units):
    """Mean over tokens of the square of what a unit's channels have in sum of activation times gradient."""
    x, gradients = values["x"], values["gradients"]
    width = len(x[0]) // units
    scores = []
    for u in range(units):
        channels = range(u * width, (u + 1) * width)
        scores.append(sum(sum(a[j] * g[j] for j in channels) ** 2 for a, g in zip(x, gradients, strict=True)) / len(x))
    return scores


def fisher_oracle(raw, structure, p, remove_heads, kv_heads, projections):
    """Kept units: every module its best, else the lowest go; in AL-AM by loss per weight until the share is gone."""
    cost = {"attention": (2 * (H // kv_heads) + 2) * SIZE * D, "mlp": projections * SIZE}
    units = {"attention": kv_heads, "mlp": F}
    scores = {(i, m): fisher_scores(raw[i][m], units[m]) for i in range(L) for m in units}
    may_go = [(s, i, m, u) for (i, m), own in scores.items() for u, s in enumerate(own) if s < max(own)]
    per_layer = sum(units[m] * cost[m] for m in units)
    if structure == "AL-AM":
        gone, weights = [], 0
        for _, i, m, u in sorted((s / cost[m], i, m, u) for s, i, m, u in may_go):
            if weights >= p * L * per_layer:
                break
            gone.append((i, m, u))
            weights += cost[m]
    elif structure == "AL-MM":
        neurons = int((p * L * per_layer - remove_heads * cost["attention"]) / cost["mlp"])
        gone = [
            (i, m, u)
            for module, count in (("attention", remove_heads), ("mlp", neurons))
            for _, i, m, u in sorted(entry for entry in may_go if entry[2] == module)[:count]
        ]
    else:
        heads = remove_heads // L if structure == "UL-MM" else int(p * kv_heads)
        neurons = int((p * per_layer - heads * cost["attention"]) / cost["mlp"]) if structure == "UL-MM" else int(p * F)
        gone = [
            (i, m, u)
            for layer in range(L)
            for module, count in (("attention", heads), ("mlp", neurons))
            for _, i, m, u in sorted(entry for entry in may_go if entry[1:3] == (layer, module))[:count]
        ]
    return {key: [u for u in range(units[key[1]]) if (*key, u) not in set(gone)] for key in scores}


@pytest.mark.parametrize("kv_heads", [8, 4, 2], ids=["mha", "gqa2", "gqa4"])
@pytest.mark.parametrize("structure", ["UL-UM", "UL-MM", "AL-MM", "AL-AM"])
@pytest.mark.parametrize("projections", [3, 2], ids=["gated", "ungated"])
def test_fisher_plans_equal_the_oracle(structure, kv_heads, projections):
    draw = random.Random(f"{structure}{kv_heads}{projections}")
    for seed in range(4):
        stats, raw = random_stats(kv_heads, projections, seed)
        p = draw.choice([0.1, 0.25, 0.3, 0.5])
        remove_heads = draw.randint(0, L * kv_heads // 8) if structure.endswith("MM") else None
        plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", "FISHER", Request(structure, p, remove_heads), 2.0)
        expected = fisher_oracle(raw, structure, p, remove_heads, kv_heads, projections)
        assert {(i, m): plan.kept(i, m).tolist() for i in range(L) for m in ("attention", "mlp")} == expected
        assert plan.settings["attention_exponent"] is None


@pytest.mark.parametrize("structure", ["UL-UM", "AL-AM", "AL-MM"])
def test_floors_hold_at_the_highest_ratios(structure):
    stats, _ = random_stats(4, 3, 1)
    heads = 9 if structure == "AL-MM" else None
    plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", "WIFV", Request(structure, 0.85, heads), 2.0)
    assert min(plan.counts("attention")) >= 1
    assert min(plan.counts("mlp")) >= 1
    assert plan.ratio.achieved == pytest.approx(0.85, abs=0.11 if structure == "UL-UM" else 0.03)


def test_allow_empty_lets_modules_vanish():
    stats, _ = random_stats(4, 3, 1)
    request = Request("AL-AM", 0.97, allow_empty=True)
    plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", "WIFV", request, 2.0)
    assert 0 in plan.counts("attention") + plan.counts("mlp")


@pytest.mark.parametrize("metric", ["IFV", "WIFV", "WIFN", "FISHER"])
@pytest.mark.parametrize("structure", ["AL-MM", "AL-AM"])
def test_units_without_effect_go_first(structure, metric):
    """A layer whose weights and activations are all 0, and half of another's neurons: before anything that acts."""
    stats, _ = random_stats(4, 3, 1)
    dead = {(1, "attention"): np.arange(H * D), (1, "mlp"): np.arange(F), (2, "mlp"): np.arange(F // 2)}
    fields = ("mean", "variance", "square_mean", "weight_square_sum", "weight_abs_mean")
    for key, channels in dead.items():
        for name in fields:
            getattr(stats.modules[key], name)[channels] = 0
        stats.fisher[key][: max(len(channels) // (H * D // 4 if key[1] == "attention" else 1), 1)] = 0
    heads = 3 if structure == "AL-MM" else None
    plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", metric, Request(structure, 0.33, heads), 2.0)
    assert plan.counts("attention")[1] == plan.counts("mlp")[1] == 1  # a module keeps one without --allow-empty
    assert plan.kept(2, "mlp").min() >= F // 2
    assert min(plan.counts("attention")[i] for i in (0, 2, 3)) >= 3


@pytest.mark.parametrize("structure", ["UL-UM", "AL-AM"])
@pytest.mark.parametrize("multiple", [4, 7, 16])
def test_round_to_keeps_multiples_near_the_ratio(structure, multiple):
    stats, _ = random_stats(4, 3, 2)
    plain = choose(stats, StatsRef(path="s", sha256="0"), "flap", "WIFV", Request(structure, 0.3), 2.0)
    request = Request(structure, 0.3, round_to=multiple)
    plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", "WIFV", request, 2.0)
    assert all(count % multiple == 0 and count for count in plan.counts("mlp"))
    if structure == "UL-UM":  # layers that are alike stay so, each at its nearest multiple
        [count], [exact] = set(plan.counts("mlp")), set(plain.counts("mlp"))
        assert abs(count - exact) <= multiple / 2
        return
    assert abs(sum(plan.counts("mlp")) - sum(plain.counts("mlp"))) <= multiple * L / 2


def test_heads_multiple_of_keeps_the_ratio_by_neurons():
    stats, _ = random_stats(8, 3, 2)
    request = Request("AL-AM", 0.3, heads_multiple_of=4)
    plan = choose(stats, StatsRef(path="s", sha256="0"), "flap", "WIFV", request, 2.0)
    assert all(count % 4 == 0 and count for count in plan.counts("attention"))
    assert plan.ratio.achieved == pytest.approx(0.3, abs=0.005)
