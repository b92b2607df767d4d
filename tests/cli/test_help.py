"""What `flap X --help` prints: every default that is not the option's own value, and panels where options are many."""

import re

import pytest
from typer.main import get_command

from flapcli.cli.app import app

DEFAULTS = {
    "calibrate": ["wikitext2; pydoc for demo", "--stream where the weights exceed the device's free memory",
                  "1024; 128 by --preset best"],
    "plan": [
        "0.2", "WIFV; FISHER-OBS by --preset best", "AL-AM", "2 for flap, 1 for baselines",
        "as apply adds them by default: for flap, not for baselines or --preset best",
    ],
    "apply": [
        "bias for flap, none for baselines", "with; without by --preset best", "not; by --preset best yes",
        "0.01; 0.3 with --sequential, where it holds every fit near the one without",
        "what the plan's --target-size was counted in, else the source's",
    ],
    "heal": ["DIR/pruned", "the calibration's text and self, half each", "1000000", "0.001; 5e-05 with --full"],
    "eval": ["DIR/pruned", "the calibration text's test part", "the task's own or 0", "its own choice"],
    "run": ["best; paper for baselines", "0.2", "wikitext2; pydoc for demo", "the source's"],
    "sweep": ["0.1,0.2,0.3,0.5", "the source's"],
    "generate": ["DIR/pruned"],
    "export": ["DIR/pruned"],
    "push": ["DIR/pruned"],
}  # fmt: skip


def printed(flap, command, monkeypatch):
    """The help as one line of text, borders left out."""
    monkeypatch.setenv("COLUMNS", "400")
    return re.sub(r"[\s│╭╮╰╯─]+", " ", flap(command, "--help").stdout)


@pytest.mark.parametrize("command", DEFAULTS)
def test_defaults_are_printed(command, flap, monkeypatch):
    text = printed(flap, command, monkeypatch)
    for default in DEFAULTS[command]:
        assert re.search(rf"\[default: \(?{re.escape(default)}\)?\]", text), f"{default!r} is not in: {text}"
    assert not re.search(r" \.( |$)", text)  # what a default that vanished leaves behind


def test_options_of_run_stand_in_panels(flap, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = flap("run", "--help").stdout
    panels = re.findall(r"^╭─ (.+?) ─", text, re.MULTILINE)
    others = ["Plan", "Apply", "Healing", "Text", "Calibration", "Evaluation", "Execution", "Options"]
    assert panels == ["Arguments", "Common", *others, "Rare"]
    common = text[text.index("─ Common ─") : text.index("─ Plan ─")]
    assert re.findall(r"--[a-z-]+(?= [A-Z])", common) == [
        "--run-dir", "--preset", "--ratio", "--dataset", "--nsamples", "--perplexity"
    ]  # fmt: skip
    assert text.rstrip().splitlines()[-1].startswith("    $ ")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", DEFAULTS)
def test_no_terminal_cuts_names(command, columns, flap, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = flap(command, "--help").stdout
    for param in get_command(app).commands[command].params:
        assert all(re.search(rf"(^|[ │]){name}[ ,│\n]", text) for name in (*param.opts, *param.secondary_opts)
                   if param.param_type_name == "option")  # fmt: skip
    assert "…" not in text
    assert all(len(line) <= columns for line in text.splitlines() if "$" not in line and "|" not in line)
