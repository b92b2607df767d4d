"""The house keeps its direction of flow, and what must be light stays light."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import flapcli

ROOT = Path(flapcli.__file__).parent
STAGES = ("calibration", "planning", "pruning", "healing", "evaluation", "export", "estimation")
# Functions that typer calls.
COMMANDS = ["heal_command", "results", "run_command", "stages", "sweep_command", "estimate_command"]
BOUNDARY = tuple(f"cli.{name}" for name in COMMANDS)

# Every module in its place: a module imports only what stands below it.
ROOMS = {
    "": "__main__",
    "cli": "app heal_command results run_command stages sweep_command estimate_command command misuse epilogs resolve "
    "values heal_options options help presets interrupts",
    "views": "comparison_tables contents page page_settings compare plots svg tables paper_table commands eval_rows "
    "display terminal",
    " ": "sweep",
    "calibration": "stage job in_memory request streaming brain_surgeon workload recorder "
    "block_influence routed fisher moments",
    "planning": "stage methods whole_experts depth even_groups devices allocation scores target_search",
    "pruning": "stage trial companions per_layer sequential sharpness shared_solves sequential_fit slicing "
    "compensation covariance layout cut stock_form kept_layers",
    "healing": "stage distillation healed_folder budget work training training_state objective student teacher_cache "
    "teacher healing_text healing_request forward",
    "evaluation": "generate stage measure peak_memory perplexity reference speed tasks task_names",
    "export": "stage gguf_writer kquants modelfile push tokenizer",
    "estimation": "estimate machine",
    "serving": "__init__ vllm_models",
    "texts": "calibration_text sampling windows mixture corpus opening",
    "execution": "divergence head hidden_states layerwise loading memory batches device processes ranks settings",
    "artifacts": "dense_model model_card sweep_results eval_report plan_of_model plan pruned_folder run_dir self_text "
    "stats_writer stats unfinished reuse target versions shared_names few_tokens",
    "checkpoints": "__init__ bin_folder safetensors_folder column_norms tensor_file gguf gguf_layout gguf_header "
    "huggingface checkpoint verification unit_counts described companion_files hub_headers locate hub_errors shards "
    "weight_index expert_files",
    "architecture": "catalogue source wrapper family gguf_form flap_section parallel modeling_flap rope rows shape",
    "storage": "hashing linear_algebra lock resume atomic owner safetensors_file json_file record dtypes sizes",
    "  ": "errors progress __init__",
}
ORDER = [f"{room.strip()}.{name}".strip(".") for room, names in ROOMS.items() for name in names.split()]


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module that holds code, by its name below flapcli; a room's own code is its `__init__`."""
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if len(tree.body) > 1:  # more than a docstring
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), tree


def imports(tree: ast.Module) -> Iterator[str]:
    """The modules of flapcli that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flapcli":
            for alias in node.names:
                names = [*node.module.split("."), alias.name][1:]
                inside = ROOT.joinpath(*names).with_suffix(".py").exists()
                names = names if inside else names[:-1]
                yield ".".join(names if ROOT.joinpath(*names).with_suffix(".py").exists() else [*names, "__init__"])


def test_every_module_has_its_place():
    assert sorted(name for name, _ in modules()) == sorted(ORDER)
    assert len(list(ROOT.glob("*.py"))) <= 5


def test_imports_go_down_only():
    for name, tree in modules():
        for target in imports(tree):
            assert ORDER.index(target) > ORDER.index(name), f"{name} imports {target}, which is above it"


def test_stages_never_import_each_other():
    for name, tree in modules():
        room = name.split(".")[0]
        others = [stage for stage in STAGES if stage != room]
        if room in STAGES:
            assert not [target for target in imports(tree) if target.split(".")[0] in others], name


def test_no_two_modules_share_a_name():
    counts = Counter(name.split(".")[-1] for name, _ in modules())
    assert [name for name, count in counts.items() if count > 1 and name not in ("stage", "__init__")] == []


def test_functions_take_few_parameters_and_fit_a_screen():
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([arg for arg in given if arg not in ("self", "cls")])
                assert count <= 8 or name in BOUNDARY, f"{name}.{node.name} takes {count} parameters"
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_sections_that_are_cited_are_there():
    method = (ROOT / "METHOD.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (.+)$", method, re.MULTILINE))
    cited = Counter()
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        for rest in re.findall(r"METHOD\.md(?:,\s+([A-Z][a-z]+(?:\s+[a-z]+)*))?", text):
            section = next((heading for heading in headings if rest.startswith(heading)), None)
            assert section, f"{path.name} cites {rest!r}, which METHOD.md does not hold"
            cited[section] += 1
        assert "DESIGN" not in text, f"{path.name} cites what the package does not hold"
    assert len(cited) > 5


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["families"], ["--version"]])
def test_light_commands_import_no_torch(arguments):
    code = (
        "import sys; from flapcli.cli.app import app\n"
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
        "import sys; from flapcli.cli.app import app\n"
        f"for arguments in (['plan', '-d', {str(run)!r}, '--ratio', '0.4'], ['show', {str(run)!r}]):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
