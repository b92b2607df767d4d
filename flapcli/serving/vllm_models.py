"""vLLM's own Llama, of layers with sizes of their own: what its Transformers backend serves too, by native kernels."""

from copy import copy
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _of_layer(config: Any, layer: int) -> Any:
    """A model's configuration with one layer's sizes, those of the section `flap` (modeling_flap.py)."""
    own = copy(config)
    own.per_layer_config = None
    for name in SIZES:
        setattr(own, name, config.flap[name][layer])
    if config.model_type == "qwen2":
        own.qkv_bias = True  # the only thing in which its layers differ from Llama's
    return own


def _add_biases(layer: torch.nn.Module, outputs: list[str]) -> None:
    """Those that compensation gave output projections which have none in vLLM; zeros where the checkpoint has none."""
    for output in map(layer.get_submodule, outputs):
        if output.bias is None:
            zeros = torch.zeros(output.output_size, dtype=output.params_dtype)
            output.bias = torch.nn.Parameter(zeros, requires_grad=False)
            set_weight_attrs(output.bias, {"weight_loader": output.weight_loader})


class _Layer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config, prefix, _of_layer(config, extract_layer_index(prefix)))
        _add_biases(self, config.flap["biases"])


class _Qwen3Layer(Qwen3DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config = vllm_config.model_config.hf_config
        own = _of_layer(config, extract_layer_index(prefix))
        super().__init__(own, vllm_config.cache_config, vllm_config.quant_config, prefix)
        _add_biases(self, config.flap["biases"])


class Llama(LlamaForCausalLM):
    layer_type: type[torch.nn.Module] = _Layer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_type)


class Mistral(Llama):
    pass


class Qwen2(Llama):
    pass


class Qwen3(Llama):
    layer_type = _Qwen3Layer
