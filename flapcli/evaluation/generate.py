"""`flap generate`: what the dense and the pruned model say to a prompt. Nothing is cached."""

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, set_seed

from flapcli.artifacts.dense_model import dense_of
from flapcli.checkpoints import Hub
from flapcli.errors import FlapError, first_line
from flapcli.evaluation.stage import open_measured
from flapcli.execution.device import Runtime
from flapcli.execution.loading import load_model, quiet_transformers
from flapcli.execution.settings import Execution, GenerateOptions
from flapcli.progress import Advance, Progress, Silent


def generate(
    prompt: str,
    checkpoint_name: str | Path,
    options: GenerateOptions = GenerateOptions(),
    model: str | None = None,
    hub: Hub = Hub(),
    execution: Execution = Execution(),
    progress: Progress = Silent(),
) -> dict[str, str]:
    """Each model's continuation of `prompt`, as `dense` and `pruned` (or `model` alone)."""
    checkpoint = open_measured(checkpoint_name, hub)
    dense = dense_of(checkpoint.made_by, model, hub) if options.baseline else None
    quiet_transformers()
    runtime = Runtime.of_eval(execution, options.dtype)
    said = {}
    for label, which in ({"dense": dense, "pruned": checkpoint} if dense else {"model": checkpoint}).items():
        tokenizer = which.load_tokenizer()
        ids = encode(tokenizer, prompt, options.chat)
        which.refuse_ids(ids.numpy())
        progress.note(f"{label}: {which.name}")
        progress.doing(f"loading {label}")
        loaded = load_model(which, runtime.dtype, runtime.device)
        with progress.task(label, options.max_new_tokens, "tokens") as advance:
            said[label] = continuation(loaded, tokenizer, ids, options, advance)
        gc.collect()
    return said


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids of a prompt, (1, length); `chat` puts it into the tokenizer's chat template as the user's turn.

    Raises FlapError where the tokenizer has no template or the prompt no tokens.
    """
    if chat and not tokenizer.chat_template:
        raise FlapError("the tokenizer has no chat template: leave --chat out")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        try:
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template may raise what it likes
            raise FlapError(f"the tokenizer's chat template can't lay out the prompt: {first_line(error)}") from error
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    if ids["input_ids"].shape[1] == 0:
        raise FlapError("the prompt is empty: give some text")
    return ids["input_ids"].long()


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    how: GenerateOptions,
    advance: Advance,
) -> str:
    """The text that follows the prompt `ids`, (1, length), without special tokens; the same for the same seed."""
    set_seed(how.seed)
    ids = ids.to(model.device)
    # Greedy or plain sampling: settings in the checkpoint's generation_config would make models differ by more
    # than their weights.
    sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config.update(temperature=None, top_k=None, top_p=None, repetition_penalty=None)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=how.max_new_tokens, pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([_Counts(advance)]),
            **(sampling if how.sample else {"do_sample": False}),
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


class _Counts(StoppingCriteria):
    """Stops nothing: asked after every token, it counts them."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.advance(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
