"""What `flap X --help` prints: every default that is not the option's own value, and panels where options are many."""

import re

import pytest

DEFAULTS = {
    "calibrate": ["wikitext2; pydoc for demo", "--stream where the weights exceed the device's free memory", "1024"],
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
    "run": ["0.2", "wikitext2; pydoc for demo", "the source's"],
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
    stages = ["Plan", "Apply", "Healing", "Text", "Calibration", "Evaluation", "Execution", "Hub"]
    assert panels == ["Arguments", "Options", *stages]
    assert text.index("─ Plan ─") < text.index("--ratio ") < text.index("─ Apply ─") < text.index("--compensate ")
