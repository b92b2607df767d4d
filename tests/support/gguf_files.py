"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from flapcli.checkpoints import open_checkpoint
from flapcli.export.tokenizer import converted


def permute(rows, head_dim: int):
    """Interleave the two rotary halves of each head's rows, as llama.cpp's `normal` rotation reads them."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, folder: Path, factors: np.ndarray | None = None, vocabulary: bool = False) -> Path:
    """A dense llama as llama.cpp's converter writes it, with rope factors, or with the folder's tokenizer."""
    source = open_checkpoint(str(folder))
    shape = source.shape
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    for field in converted(source.load_tokenizer(), 320, str(folder))[0] if vocabulary else []:
        writer.add_key_value(*field)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name in source.tensors:
        values = source.read(name)
        if ".q_proj." in name or ".k_proj." in name:
            values = permute(values, shape.head_dim)
        theirs = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        for ours, them in (
            ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("model.norm", "output_norm"), ("lm_head", "output"),
        ):  # fmt: skip
            theirs = theirs.replace(ours, them)
        writer.add_tensor(theirs, values.numpy(), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
