"""Models that tests and benchmarks run on: tiny random ones of every family, and SmolLM2 with K and V repeated."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from flapcli.checkpoints import open_checkpoint
from flapcli.checkpoints.shards import plan_shards, write_shards
from flapcli.storage.safetensors_file import TensorSpec

SIZES = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3}
MHA = {"num_attention_heads": 6, "num_key_value_heads": 6}

# One configuration for every trait that pruning must get right.
CONFIGS = {
    "llama-gqa": LlamaConfig(**SIZES, **GQA),
    "llama-mha": LlamaConfig(**SIZES, **MHA),
    "llama-biases": LlamaConfig(**SIZES, **GQA, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**SIZES, **GQA, tie_word_embeddings=True),
    "llama-head-dim": LlamaConfig(**SIZES, **GQA, head_dim=12),
    "mistral": MistralConfig(**SIZES, **GQA, head_dim=8, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, **GQA, head_dim=8, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES, **GQA),
    "qwen2-tied": Qwen2Config(**SIZES, **MHA, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SIZES, **GQA, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, **GQA, head_dim=16),
}
# Enough for what every family shares; tests/architecture holds each of them to its contract.
FEW = ["llama-biases", "mistral-window", "qwen3"]


def make_tiny(folder: Path, kind: str, seed: int = 0, shard: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """A random model of CONFIGS[kind] in `folder`, with weights so large that every unit matters, and a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))  # saving writes into a config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + ("norm" in name))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """A byte-level tokenizer of fewer than 320 tokens, trained on a few lines."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"] * 3, vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def expand_to_mha(folder: Path) -> Path:
    """SmolLM2 (the demo) with K and V repeated to 9 heads, float32: what METHOD.md ran the authors' code on."""
    source = open_checkpoint("demo")
    heads, groups, dim = 9, 3, 64
    folder.mkdir(parents=True)

    def tensors():
        for name in source.tensors:
            tensor = source.read(name)
            if ".k_proj." in name or ".v_proj." in name:
                tensor = tensor.view(groups, dim, -1).repeat_interleave(heads // groups, 0).flatten(0, 1)
            yield name, tensor

    specs = [TensorSpec(name, tuple(tensor.shape), "F32") for name, tensor in tensors()]
    write_shards(folder, plan_shards(specs, 10**12), tensors())
    config = source.config | {"num_key_value_heads": heads, "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    source.load_tokenizer().save_pretrained(folder)
    return folder


def load_dense(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def to_bin(folder, shards=1):
    """Replace a folder's safetensors by .bin files."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(weights)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        files = ["pytorch_model.bin"]
    else:
        index = {n: f for f, part in zip(files, parts, strict=True) for n in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, part in zip(files, parts, strict=True):
        torch.save({n: weights[n] for n in part}, folder / file)
    return folder
