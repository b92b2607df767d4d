"""The options of `flap heal`, and those of `run` and `sweep` that ask for it."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import typer

from flapcli.cli import options as o
from flapcli.execution import settings as s

_in_text, _in_heal, _in_execution = (partial(typer.Option, rich_help_panel=p) for p in ("Text", "Healing", "Execution"))


# fmt: off
HealMinutes = Annotated[float | None, _in_heal(
    min=0.01, help="Train the pruned model to answer like the dense one for about so long (`flap heal`), and measure "
    "what comes of it.")]
HealTokens = Annotated[int | None, _in_heal(
    min=1, help="Train every pruned model on so many tokens (`flap heal`), and measure what comes of it.")]


@dataclass(frozen=True)
class HealGroup:
    """How a pruned model is trained."""

    dataset: Annotated[list[str] | None, _in_text(
        help="Text: wikitext2, ptb, c4, pydoc, a .txt, .jsonl or .parquet file, or self (which the dense model "
        "writes); repeatable, with shares as in pydoc:0.7.", show_default="the calibration's text and self, half each")
        ] = None
    tokens: Annotated[int | None, _in_heal(min=1, help="Tokens to train on.", show_default="1000000")] = None
    minutes: Annotated[float | None, _in_heal(
        min=0.01, help="Instead of --tokens: as many as this machine is timed to take in so many minutes.")] = None
    loss: Annotated[s.Loss, _in_heal(
        help="kl: divergence from the dense model's answers; ce: cross entropy of the text; kl+ce: half each."
        )] = s.HealOptions.loss
    hidden_layers: Annotated[str | None, _in_heal(
        "--hidden-layers", help="Hold the hidden states behind these layers, such as 9,19, to the dense model's too."
        )] = None
    top_k: Annotated[int, _in_heal(
        "--top-k", min=1, help="Of the dense model's answers the likeliest tokens that are kept on disk (6 bytes each "
        "and 4 for all others, a place).")] = s.HealOptions.top_k
    online: Annotated[bool, _in_heal(
        "--online", help="Keep nothing: the dense model stays in memory, and its whole answers are learnt.")] = False
    lora_rank: Annotated[int, _in_heal(
        "--lora-rank", min=1, help="Rank of the adapters on all projections.")] = s.HealOptions.rank
    full: Annotated[bool, _in_heal("--full", help="Train all weights of the decoder layers instead.")] = False
    lr: Annotated[float | None, _in_heal(
        help="Highest learning rate: after a warm-up it falls as a cosine.", show_default="0.001; 5e-05 with --full")
        ] = None
    windows_per_step: Annotated[int, _in_heal(
        "--windows-per-step", min=1, help="Windows whose gradients make one step, in as many batches as it takes."
        )] = s.HealOptions.step_windows
    seed: Annotated[int, _in_heal(help="Seed of windows, their order, and adapters.")] = s.HealOptions.seed
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], _in_heal(
        "--dtype", help="What the models run in; auto: bfloat16 where the hardware has it.")] = "auto"
    checkpoint_activations: Annotated[bool, _in_execution(
        "--checkpoint-activations", help="Compute activations anew in the backward pass: less memory, more time.")
        ] = False
    device_map: o.DeviceMap = None
    rank_timeout: o.RankTimeout = s.Execution.rank_timeout
# fmt: on
