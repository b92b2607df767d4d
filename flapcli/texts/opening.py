"""The special tokens that a tokenizer puts before every text, mostly BOS or none: every window begins with them."""

from itertools import takewhile
from typing import TYPE_CHECKING

from flapcli.checkpoints import Checkpoint
from flapcli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opening(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that the tokenizer puts before a text by itself: what it does, whatever its settings say."""
    empty, text = (tokenizer(text).input_ids for text in ("", "a"))
    special = set(tokenizer.all_special_ids)
    both = takewhile(lambda pair: pair[0] == pair[1] and pair[0] in special, zip(empty, text, strict=False))
    return [token for token, _ in both]


def opening_text(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The opening as artifacts name it, such as `<bos>`; None where there is none."""
    return "".join(tokenizer.convert_ids_to_tokens(opening(tokenizer))) or None


def first_predicted(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Place of a window's first token that something predicts and that is text, which an opening is not."""
    return max(1, len(opening(tokenizer)))


def room_for_text(first: list[int], seqlen: int) -> int:
    """Tokens of text in a window of `seqlen` that begins with `first`. Raises UsageError where there are none."""
    if seqlen <= len(first):
        raise UsageError(f"--seqlen {seqlen}: windows begin with {len(first)} special tokens: raise it")
    return seqlen - len(first)


def opens_as(checkpoint: Checkpoint, *said: str | None) -> bool:
    """Whether the checkpoint's windows begin as those that artifacts of the same tokenizer name, each by its opening.

    Where one names none, a flap that gave windows no opening may have made it. The tokenizer is loaded, which takes
    seconds, only where its files alone do not tell.
    """
    return None not in said or not checkpoint.may_open_texts or not opening(checkpoint.load_tokenizer())
