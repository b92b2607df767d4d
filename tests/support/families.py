"""A tiny configuration for every description of a family, and for each of its variants."""

import copy

import torch
from support.models import GQA, SIZES, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

HEADS = {"num_attention_heads": 6}
MQA = {"num_attention_heads": 6, "num_key_value_heads": 1}
MLA = {"num_attention_heads": 6, "num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 12, "v_head_dim": 10,
       "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
            "moe_intermediate_size": 24}  # fmt: skip
WINDOW = {"sliding_window": 5}
GPT = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 56, "n_positions": 256, "vocab_size": 320, "bos_token_id": 1,
       "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
FALCON = SIZES | {"num_attention_heads": 6, "ffn_hidden_size": 56}

# By name: the model_type and what its configuration is made with.
FAMILY_CONFIGS: dict[str, tuple[str, dict]] = {
    "apertus": ("apertus", SIZES | GQA),
    "arcee": ("arcee", SIZES | GQA | {"mlp_bias": True}),
    "biogpt": ("biogpt", SIZES | HEADS),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 6, "hidden_size": 48, "vocab_size": 320}),
    "cohere": ("cohere", SIZES | GQA | {"logit_scale": 0.3}),
    "cohere-norms": ("cohere", SIZES | GQA | {"use_qk_norm": True, "attention_bias": True}),
    "cohere2": ("cohere2", SIZES | GQA | WINDOW),
    "deepseek_v2": ("deepseek_v2", SIZES | MLA | {"first_k_dense_replace": 3, "mlp_bias": True}),
    "deepseek_v2-experts": ("deepseek_v2", SIZES | MLA | DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v3-experts": ("deepseek_v3", SIZES | MLA | DEEPSEEK | {"n_group": 2, "topk_group": 1}),
    "deepseek_v3": ("deepseek_v3", SIZES | MLA | {"first_k_dense_replace": 3, "attention_bias": True}),
    "deepseek_v3-whole-q": ("deepseek_v3", SIZES | MLA | {"first_k_dense_replace": 3, "q_lora_rank": None}),
    "ernie4_5": ("ernie4_5", SIZES | GQA | {"head_dim": 8, "use_bias": True}),
    "exaone": ("exaone", SIZES | GQA),
    "exaone4": ("exaone4", SIZES | GQA | WINDOW),
    "falcon": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3}),
    "falcon-7b": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-rw": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False,
                                      "alibi": True, "bias": True}),
    "gemma": ("gemma", SIZES | MQA | {"head_dim": 8}),
    "gemma2": ("gemma2", SIZES | GQA | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8,
                                                 "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", SIZES | MQA | WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "glm": ("glm", SIZES | GQA | {"head_dim": 8, "attention_bias": True}),
    "glm4": ("glm4", SIZES | GQA | {"head_dim": 8}),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode-mha": ("gpt_bigcode", GPT | {"multi_query": False}),
    "gpt_neox": ("gpt_neox", SIZES | {"num_attention_heads": 6}),
    "gpt_neox-serial": ("gpt_neox", SIZES | {"num_attention_heads": 6, "use_parallel_residual": False}),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "granite": ("granite", SIZES | GQA | {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "mlp_bias": True,
                                          "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "granitemoe": ("granitemoe", SIZES | GQA | {"num_local_experts": 4, "num_experts_per_tok": 2,
                                                "residual_multiplier": 0.5}),
    "gpt_oss": ("gpt_oss", SIZES | GQA | WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite_swa": ("granite_swa", SIZES | GQA | WINDOW),
    "helium": ("helium", SIZES | GQA | {"head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", SIZES | GQA | {"head_dim": 8}),
    "hyperclovax": ("hyperclovax", SIZES | GQA),
    "internlm3": ("internlm3", SIZES | GQA | {"head_dim": 8}),
    "iquestcoder": ("iquestcoder", SIZES | GQA | {"head_dim": 8}),
    "jais2": ("jais2", SIZES | GQA),
    "llama": ("llama", SIZES | GQA),
    "minicpm3": ("minicpm3", SIZES | MLA | {"scale_emb": 2, "dim_model_base": 16}),
    "llama4_text": ("llama4_text", SIZES | GQA | {
        "head_dim": 8, "intermediate_size": 32, "intermediate_size_mlp": 56, "num_local_experts": 4,
        "num_experts_per_tok": 2, "moe_layers": [0, 2]}),
    "minimax_m2": ("minimax_m2", SIZES | GQA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
                                                "rotary_dim": 8}),
    "ministral3": ("ministral3", SIZES | GQA | {"head_dim": 8}),
    "mistral": ("mistral", SIZES | GQA | WINDOW),
    "mixtral": ("mixtral", SIZES | GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-silent": ("mixtral", SIZES | GQA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 3, "vocab_size": 320, "max_seq_len": 256}),
    "nanochat": ("nanochat", SIZES | GQA),
    "nemotron": ("nemotron", SIZES | GQA | {"head_dim": 8}),
    "olmo": ("olmo", SIZES | GQA | {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", SIZES | GQA | {"attention_bias": True}),
    "olmo3": ("olmo3", SIZES | GQA | WINDOW | {"intermediate_size": 64}),
    "olmoe": ("olmoe", SIZES | GQA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", SIZES | HEADS | {"ffn_dim": 56, "word_embed_proj_dim": 48}),
    "opt-post-norm": ("opt", SIZES | HEADS | {"ffn_dim": 56, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", SIZES | {"num_attention_heads": 6}),
    "phi": ("phi", SIZES | GQA),
    "phi3": ("phi3", SIZES | GQA),
    "phimoe": ("phimoe", SIZES | GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True}),
    "qwen2": ("qwen2", SIZES | GQA),
    "qwen2_moe": ("qwen2_moe", SIZES | GQA | MOE | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 40}),
    "qwen3": ("qwen3", SIZES | GQA | {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", SIZES | GQA | MOE | {"head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "seed_oss": ("seed_oss", SIZES | GQA | {"head_dim": 8}),
    "smollm3": ("smollm3", SIZES | GQA),
    "stablelm": ("stablelm", SIZES | GQA | {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", SIZES | GQA | {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", SIZES | GQA),
    "vaultgemma": ("vaultgemma", SIZES | GQA | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "xglm": ("xglm", {"num_layers": 3, "d_model": 48, "ffn_dim": 56, "attention_heads": 6, "vocab_size": 320,
                      "max_position_embeddings": 256}),
}  # fmt: skip


def make_family(folder, name, **more):
    """A random model in which every unit matters, its biases and norms included, and a tokenizer; `more` settings."""
    torch.manual_seed(0)
    kind, settings = FAMILY_CONFIGS[name]
    settings = copy.deepcopy(settings | more)
    return save_random(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)), folder)


def save_random(model, folder):
    """The model with random values for its own, in a folder with a tokenizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.3 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * size + (parameter.ndim == 1 and bool((parameter == 1).all())))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
