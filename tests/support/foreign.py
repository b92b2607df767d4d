"""Tiny models in the files of their publishers' own code, made from ones of transformers, and what that code computes.

Written from the publishers' descriptions and independent of flap's own conversions, whose oracle they are.
"""

import json

import torch
from safetensors.torch import load_file, save_file
from support.families import make_family
from torch.nn.functional import linear, normalize, silu

AUTO_MAP = {"AutoConfig": "configuration_foreign.ForeignConfig", "AutoModelForCausalLM": "modeling_foreign.Foreign"}
TRAP = "raise SystemExit('remote code ran')\n"
HEADS, GROUPS, DIM = 6, 3, 8


def _layers(tensors, rename, prefix="model.layers."):
    """Every tensor under the foreign name; `rename` maps local names of layers, and whole names of others."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            _, _, index, local = name.split(".", 3)
            part, _, leaf = local.rpartition(".")
            found[f"{prefix}{index}.{rename.get(part, part)}.{leaf}"] = tensor
        else:
            part, _, leaf = name.rpartition(".")
            found[f"{rename.get(part, part)}.{leaf}"] = tensor
    return found


def _fuse(tensors, into, join):
    """Queries, keys and values of every layer in one tensor."""
    found = dict(tensors)
    for name in [n for n in tensors if ".self_attn.q_proj." in n]:
        qkv = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace("self_attn.q_proj", into)] = join(*qkv)
    return found


def _stacked(q, k, v):
    return torch.cat([q, k, v])


def _by_groups(q, k, v):
    """Of each group: its query heads, its key and its value."""
    per_group = HEADS // GROUPS * DIM
    parts = zip(q.split(per_group), k.split(DIM), v.split(DIM), strict=True)
    return torch.cat([part for group in parts for part in group])


def _baichuan(config, tensors):
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act rms_norm_eps"
    found = _fuse(tensors, "self_attn.W_pack", _stacked)
    for i in range(3):
        found[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return {key: config[key] for key in keys.split()} | {"max_position_embeddings": 256}, found


def _baichuan2(config, tensors):
    """Its head's rows are of any length, and divided by it when the model is loaded."""
    made, found = _baichuan(config, tensors)
    tensors["lm_head.weight"] = normalize(tensors["lm_head.weight"])
    lengths = torch.rand(len(tensors["lm_head.weight"]), 1) + 0.5
    return made | {"z_loss_weight": 0}, found | {"lm_head.weight": tensors["lm_head.weight"] * lengths}


def _internlm2(config, tensors):
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    keys += " hidden_act rms_norm_eps max_position_embeddings"
    rename = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    rope = {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    made = {key: config[key] for key in keys.split()} | rope | {"bias": config["attention_bias"]}
    return made, _layers(_fuse(tensors, "attention.wqkv", _by_groups), rename)


def _chatglm(config, tensors):
    rename = {
        "model.embed_tokens": "transformer.embedding.word_embeddings", "lm_head": "transformer.output_layer",
        "model.norm": "transformer.encoder.final_layernorm", "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    found = _layers(_fuse(tensors, "self_attention.query_key_value", _stacked), rename, "transformer.encoder.layers.")
    made = {
        "padded_vocab_size": config["vocab_size"], "hidden_size": 48, "ffn_hidden_size": config["intermediate_size"],
        "num_layers": 3, "num_attention_heads": HEADS, "multi_query_group_num": GROUPS, "multi_query_attention": True,
        "kv_channels": DIM, "seq_length": 256, "layernorm_epsilon": config["rms_norm_eps"], "add_qkv_bias": True,
        "rope_ratio": 50, "rmsnorm": True, "add_bias_linear": False,
    }  # fmt: skip
    return made, found | {"transformer.rotary_pos_emb.inv_freq": torch.ones(2)}


def _qwen(config, tensors):
    rename = {
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    made = {
        "vocab_size": config["vocab_size"], "hidden_size": 48, "intermediate_size": 2 * config["intermediate_size"],
        "num_hidden_layers": 3, "num_attention_heads": HEADS, "kv_channels": DIM, "seq_length": 256,
        "max_position_embeddings": 1024, "layer_norm_epsilon": config["rms_norm_eps"], "rotary_emb_base": 10000,
        "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True,
    }  # fmt: skip
    return made, _layers(_fuse(tensors, "attn.c_attn", _stacked), rename, "transformer.h.")


# By name: the model_type, the family in FAMILY_CONFIGS with what is changed in it, and the way there.
FOREIGN = {
    "baichuan": ("baichuan", "llama", {"num_key_value_heads": 6}, _baichuan),
    "baichuan2": ("baichuan", "llama", {"num_key_value_heads": 6}, _baichuan2),
    "internlm2": ("internlm2", "llama", {"attention_bias": True, "rope_theta": 1e6}, _internlm2),
    "chatglm": ("chatglm", "glm", {"rope_theta": 5e5}, _chatglm),
    "qwen": ("qwen", "qwen2", {"num_key_value_heads": 6}, _qwen),
}


def make_foreign(folder, name):
    """The folder as its publisher has it, with code that must not run; beside it, as `native`, the model it is."""
    kind, family, changes, convert = FOREIGN[name]
    native = make_family(folder / "native", family, **(changes or {}))
    config, tensors = json.loads((native / "config.json").read_text()), load_file(native / "model.safetensors")
    made, found = convert(config, tensors)
    save_file(tensors, native / "model.safetensors", {"format": "pt"})
    foreign = folder / "foreign"
    foreign.mkdir()
    save_file({n: t.clone() for n, t in found.items()}, foreign / "model.safetensors", {"format": "pt"})
    told = {
        "model_type": kind,
        "architectures": ["Foreign"],
        "auto_map": AUTO_MAP,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (foreign / "config.json").write_text(json.dumps(told | made))
    for code in ("configuration_foreign.py", "modeling_foreign.py"):
        (foreign / code).write_text(TRAP)
    for path in native.glob("tokenizer*"):
        (foreign / path.name).write_bytes(path.read_bytes())
    return foreign


def _rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _halves(x, base):
    """Rotation of the first half of each head against the second, of (tokens, heads, dim)."""
    angles = torch.arange(len(x))[:, None] / base ** (torch.arange(0, DIM, 2) / DIM)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def _pairs(x, base):
    """Rotation of neighbours against each other, in the first half of each head."""
    turned, still = x.chunk(2, -1)
    angles = torch.arange(len(x))[:, None] / base ** (torch.arange(0, DIM // 2, 2) / (DIM // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, other = turned[..., ::2], turned[..., 1::2]
    turned = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2)
    return torch.cat([turned, still], -1)


def _heads(fused, groups):
    return [part.unflatten(-1, (-1, DIM)) for part in fused.split([HEADS * DIM, groups * DIM, groups * DIM], -1)]


def _interleaved(fused, groups):
    apart = fused.unflatten(-1, (groups, HEADS // groups + 2, DIM))
    return apart[:, :, :-2].flatten(1, 2), apart[:, :, -2], apart[:, :, -1]


def foreign_logits(folder, ids):
    """What the publisher's code computes of each text."""
    config, w = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    return torch.stack([FORWARDS[config["model_type"]](config, w, text) for text in ids])


def _decode(ids, w, eps, names, split, turn, mlp):
    """Logits of one text. `names` are of embedding, layers, first norm, fused projection, output, second norm, final
    norm and head."""
    embedding, layers, first, fused, output, second, final, head = names
    x = w[f"{embedding}.weight"][ids]
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(3):
        layer = {name.removeprefix(f"{layers}.{i}."): t for name, t in w.items() if name.startswith(f"{layers}.{i}.")}
        states = _rms(x, layer[f"{first}.weight"], eps)
        q, k, v = split(linear(states, layer[f"{fused}.weight"], layer.get(f"{fused}.bias")))
        q, k, v = turn(q), *(each.repeat_interleave(HEADS // each.shape[1], 1) for each in (turn(k), v))
        scores = torch.einsum("thd,shd->hts", q, k) / DIM**0.5
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)
        x = x + linear(mixed, layer[f"{output}.weight"], layer.get(f"{output}.bias"))
        x = x + mlp(_rms(x, layer[f"{second}.weight"], eps), layer)
    return linear(_rms(x, w[f"{final}.weight"], eps), w[f"{head}.weight"])


def _gated(gate, up, down):
    def mlp(x, layer):
        return linear(
            silu(linear(x, layer[f"{gate}.weight"])) * linear(x, layer[f"{up}.weight"]), layer[f"{down}.weight"]
        )

    return mlp


def _forward_baichuan(config, w, ids):
    if "z_loss_weight" in config:
        w = w | {"lm_head.weight": normalize(w["lm_head.weight"])}
    names = (
        "model.embed_tokens", "model.layers", "input_layernorm", "self_attn.W_pack", "self_attn.o_proj",
        "post_attention_layernorm", "model.norm", "lm_head",
    )  # fmt: skip
    mlp = _gated("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return _decode(ids, w, config["rms_norm_eps"], names, lambda x: _heads(x, HEADS), lambda x: _halves(x, 1e4), mlp)


def _forward_internlm2(config, w, ids):
    names = (
        "model.tok_embeddings", "model.layers", "attention_norm", "attention.wqkv", "attention.wo", "ffn_norm",
        "model.norm", "output",
    )  # fmt: skip
    mlp = _gated("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
    turn = lambda x: _halves(x, config["rope_theta"])  # noqa: E731
    return _decode(ids, w, config["rms_norm_eps"], names, lambda x: _interleaved(x, GROUPS), turn, mlp)


def _forward_chatglm(config, w, ids):
    names = (
        "transformer.embedding.word_embeddings", "transformer.encoder.layers", "input_layernorm",
        "self_attention.query_key_value", "self_attention.dense", "post_attention_layernorm",
        "transformer.encoder.final_layernorm", "transformer.output_layer",
    )  # fmt: skip

    def mlp(x, layer):
        gate, up = linear(x, layer["mlp.dense_h_to_4h.weight"]).chunk(2, -1)
        return linear(silu(gate) * up, layer["mlp.dense_4h_to_h.weight"])

    turn = lambda x: _pairs(x, 1e4 * config["rope_ratio"])  # noqa: E731
    return _decode(ids, w, config["layernorm_epsilon"], names, lambda x: _heads(x, GROUPS), turn, mlp)


def _forward_qwen(config, w, ids):
    names = (
        "transformer.wte", "transformer.h", "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "transformer.ln_f", "lm_head",
    )  # fmt: skip
    mlp, eps = _gated("mlp.w2", "mlp.w1", "mlp.c_proj"), config["layer_norm_epsilon"]
    return _decode(ids, w, eps, names, lambda x: _heads(x, HEADS), lambda x: _halves(x, 1e4), mlp)


FORWARDS = {
    "baichuan": _forward_baichuan, "internlm2": _forward_internlm2, "chatglm": _forward_chatglm, "qwen": _forward_qwen,
}  # fmt: skip
