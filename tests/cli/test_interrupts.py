"""Ctrl-C at any moment: exit code 130 and one line that is true."""

import subprocess
import sys

import pytest

# A process that gets SIGINT as it begins to import a module, or at its very end.
STRUCK = """
import atexit, os, signal, sys
at, sys.argv = sys.argv[1], ["flap", *sys.argv[2:]]
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
strike = lambda: os.kill(os.getpid(), signal.SIGINT)
class Finder:
    def find_spec(name, path=None, target=None):
        if name == at:
            strike()
sys.meta_path.insert(0, Finder)
if at == "the end":
    atexit.register(strike)
from flapcli.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("at", "command", "said"),
    [
        ("flapcli.cli.app", "families", "interrupted before anything was done"),
        ("flapcli.planning.stage", "plan", "interrupted; no half-done plan is left"),
        ("flapcli.architecture.catalogue", "families", "interrupted; nothing was to be written"),
        ("the end", "families --json", "interrupted at its end: all was done"),
    ],
)
def test_whenever_it_comes(at, command, said):
    program = [sys.executable, "-c", STRUCK, at, *command.split()]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, f"error: {said}")
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("]\n") if at == "the end" else done.stdout == ""
