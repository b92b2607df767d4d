"""Plugins of serving engines, which import them by their entry points."""


def register() -> None:
    """Have vLLM serve what flap pruned unevenly by its own layers (entry point vllm.general_plugins)."""
    from vllm import ModelRegistry

    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        ModelRegistry.register_model(f"Flap{name}ForCausalLM", f"flapcli.serving.vllm_models:{name}")
