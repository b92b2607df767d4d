"""What a model says to a prompt."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from flapcli.errors import FlapError


@dataclass(frozen=True)
class Sampling:
    """Greedy, or with `sample` drawn at `temperature` from `seed`."""

    max_new_tokens: int = 64
    sample: bool = False
    seed: int = 0
    temperature: float = 1.0


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids of a prompt, (1, length); `chat` puts it into the tokenizer's chat template as the user's turn.

    Raises FlapError where the tokenizer has no template or the prompt no tokens.
    """
    if chat and not tokenizer.chat_template:
        raise FlapError("the tokenizer has no chat template: leave --chat out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    found = ids["input_ids"]
    if found.shape[1] == 0:
        raise FlapError("the prompt is empty: give some text")
    return found.long()


def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, sampling: Sampling
) -> str:
    """The text that follows the prompt `ids`, (1, length), without special tokens; the same for the same seed."""
    set_seed(sampling.seed)
    ids = ids.to(model.device)
    # Greedy or plain sampling: settings in the checkpoint's generation_config would make models differ by more
    # than their weights.
    chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config.update(temperature=None, top_k=None, top_p=None, repetition_penalty=None)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=padding,
            **(chosen if sampling.sample else {"do_sample": False}),
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
