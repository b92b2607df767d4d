"""Terminals that know few characters: printing never ends a run."""

import json
import os
import subprocess
import sys

import pytest

from flapcli.views import terminal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_falls_back(encoding, prune, tiny, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "flapcli"]
    shown = subprocess.run([*command, "show", str(run)], capture_output=True, env=env, check=False)
    assert shown.returncode == 0, shown.stderr
    assert b"####" in shown.stdout
    failed = subprocess.run([*command, "show", str(run / "\u65e5\u672c")], capture_output=True, env=env, check=False)
    assert failed.returncode == 1
    assert b"error: nothing at" in failed.stderr
    assert b"Traceback" not in failed.stderr


def test_forty_columns_cut_no_figure(prune, tiny, flap, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal.out, "width", 40)
    shown = flap("show", prune(tiny("llama-gqa"), tmp_path / "run")).stdout
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 40


def test_json_has_null_for_what_is_no_number(capsys):
    terminal.data({"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": None}
