"""Terminals that know few characters: printing never ends a run."""

import os
import subprocess
import sys

import pytest


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
