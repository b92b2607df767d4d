"""Checkpoints of random bfloat16 weights in a real model's sizes, made without building the model."""

import json
from pathlib import Path

import torch
from support.models import tiny_tokenizer

from flapcli.checkpoints.shards import plan_shards, write_shards
from flapcli.storage.safetensors_file import TensorSpec

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 32000,
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_7B = TINYLLAMA | {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32, "head_dim": 128
}  # fmt: skip
LLAMA_3_8B = LLAMA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMA_70B = LLAMA_7B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
WIDTHS = "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"


def divided(config: dict, by: int) -> dict:
    """A model of as many layers, with every width divided; heads stay as wide as they are."""
    return config | {key: max(config[key] // by, 1) for key in WIDTHS}


def specs(config: dict) -> list[TensorSpec]:
    """Tensors of a Llama, in the order they are stored."""
    h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, v = config["num_attention_heads"] * d, config["num_key_value_heads"] * d, config["vocab_size"]
    made = {"model.embed_tokens": (v, h)}
    for i in range(config["num_hidden_layers"]):
        made |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                "self_attn.o_proj": (h, q), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f),
                "input_layernorm": (h,), "post_attention_layernorm": (h,),
            }.items()
        }  # fmt: skip
    made |= {"model.norm": (h,), "lm_head": (v, h)}
    return [TensorSpec(f"{name}.weight", shape, "BF16") for name, shape in made.items()]


def generate(folder: Path, config: dict, device: torch.device = torch.device("cpu")) -> None:
    """Write it and a tokenizer into a new folder; drawn on the device, which only decides how long that takes."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    shards = plan_shards(specs(config), 500_000_000)

    def tensors():
        for spec in (spec for shard in shards for spec in shard):
            scale = 1 if len(spec.shape) == 1 else 0
            yield spec.name, (torch.randn(spec.shape, device=device) * 0.02 + scale).bfloat16()

    write_shards(folder, shards, tensors())
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
