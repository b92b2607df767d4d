"""What is said while work goes on: plain lines without a terminal, one moving line on one."""

import io

import pytest
import torch
from rich.console import Console

from flapcli.execution.batches import Within
from flapcli.views import display
from flapcli.views.display import Display, Heard, Pace


@pytest.fixture
def said(monkeypatch):
    """The lines that were said, which no thread adds to."""
    lines = []
    monkeypatch.setattr(display, "note", lines.append)
    return lines


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(display.time, "monotonic", found)
    return found


def test_plain_lines_come_every_tenth_and_every_half_minute(said, clock):
    shown = Display("[1/4] calibrate")

    def at(seconds):
        clock.now = seconds
        shown.tell(seconds)

    at(1)  # no line of what lasts a moment
    shown.doing("loading SmolLM2")
    at(4)
    at(20)
    with shown.task("calibrate", 1000, "tokens") as advance:
        at(21)
        at(23)
        clock.now = 33
        advance(50)
        at(34)  # a twentieth is no tenth
        clock.now = 40
        advance(50)
        at(41)
        at(60)  # a batch that takes long: silent
        at(71)  # but not for half a minute, the time left having run on
    assert said == [
        "[1/4] calibrate: loading SmolLM2 (4 s)",
        "[1/4] calibrate: 0% of 1,000 tokens",
        "[1/4] calibrate: 10%, 5 tokens/s, 2 min 59 s left",
        "[1/4] calibrate: 10%, 5 tokens/s, 2 min 29 s left",
    ]


def test_a_rate_leaves_out_what_an_earlier_run_did(clock):
    pace = Pace(10**9, "bytes")
    pace.advance(5 * 10**8)
    assert str(pace) == "50% of 1,000 MB"
    clock.now = 10.0
    pace.advance(10**7)
    assert str(pace) == "51%, 1 MB/s, 8 min 10 s left"


def test_a_terminal_has_one_line_which_others_bars_are_said_in(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    console = Console(file=terminal, force_terminal=True, width=60, markup=False)
    monkeypatch.setattr(display, "err", console)
    monkeypatch.setattr("flapcli.views.terminal.err", console)
    with Display("eval") as shown:
        assert "eval (0 s)" in terminal.getvalue()  # at once
        heard = display.sys.stderr
        assert isinstance(heard, Heard)
        heard.write("\rmodel.safetensors:  45%")
        assert shown._line().plain.endswith(" eval: model.safetensors:  45% (0 s)")
        heard.write("\na warning\n")
        with shown.task("pruned on [b].txt", 4, "tokens") as advance:
            advance(2)
            assert "eval: pruned on [b].txt ██████░░░░░░ 50%" in shown._line().plain
        assert shown._line().plain.endswith(" eval: model.safetensors:  45% (0 s)")
    assert "a warning" in terminal.getvalue()
    assert display.sys.stderr is not heard
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()[-20:]


def test_a_batch_moves_layer_by_layer():
    """Whatever ran out of memory on the way, all batches come to their tokens."""
    layers = [torch.nn.Identity() for _ in range(4)]
    told = []
    with Within(layers, told.append) as advance:
        layers[0](torch.zeros(2, 8, 3))  # runs out of memory behind its first layer
        for layer in layers:
            layer(torch.zeros(1, 8, 3))
        advance(8)
        layers[0](torch.zeros(1, 8, 3))
        advance(8)
    assert told == [4, 2, 2, 2, 2, -4, 2, 6]
    layers[0](torch.zeros(1, 8, 3))
    assert sum(told) == 16
