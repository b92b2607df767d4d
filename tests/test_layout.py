"""The house keeps its direction of flow, and what must be light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flapcli

ROOT = Path(flapcli.__file__).parent
NOUNS = {"stats", "plan", "checkpoint", "evaluate.report", "sweep", "selftext"}
VERBS = {
    "calibrate", "streamed", "choose", "apply", "export", "evaluate.measure", "evaluate.perplexity", "evaluate.tasks",
    "evaluate.speed", "evaluate.memory", "evaluate.generate", "sample", "sequential",
}  # fmt: skip
TOP = {
    "cli", "cli_results", "cli_run", "cli_stages", "cli_sweep", "command", "__main__",
    "console", "console_results", "console_sweep", "options", "show", "pipeline",
}  # fmt: skip


def imports() -> dict[str, set[str]]:
    """Every module of flapcli, and the modules of flapcli that it imports anywhere."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        targets = {n.module for n in nodes if n.module}
        targets |= {f"{n.module}.{alias.name}" for n in nodes if n.module == "flapcli" for alias in n.names}
        found[name] = {t.removeprefix("flapcli.") for t in targets if t.startswith("flapcli.")}
    return found


def room(module: str, rooms: set[str]) -> str | None:
    return next((r for r in rooms if module == r or module.startswith(r + ".")), None)


def test_nouns_and_verbs_keep_apart():
    for module, targets in imports().items():
        own_noun, own_verb = room(module, NOUNS), room(module, VERBS)
        for target in targets:
            if own_noun:
                assert room(target, NOUNS) in (None, own_noun), f"noun {module} imports noun {target}"
                assert room(target, VERBS) is None, f"noun {module} imports verb {target}"
            elif own_verb and not own_verb.startswith("evaluate"):
                assert room(target, VERBS) in (None, own_verb), f"verb {module} imports verb {target}"
            if module not in TOP and room(module, TOP) is None:
                assert room(target, TOP) is None, f"{module} imports {target}, which is above it"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["families"], ["--version"]])
def test_light_commands_import_no_torch(arguments):
    code = (
        "import sys; from flapcli.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_and_show_import_no_torch(prune, tiny, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    code = (
        "import sys; from flapcli.cli import app\n"
        f"for arguments in (['plan', '-d', {str(run)!r}, '--ratio', '0.4'], ['show', {str(run)!r}]):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
