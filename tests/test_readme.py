"""What README.md shows is what the code does."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def block_with(word: str) -> str:
    """The Python block that holds `word`."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if word in block]
    return found


def replaced(code: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in code, f"{old} is not in README's lines"
        code = code.replace(old, new)
    return code


def test_it_is_short_and_has_two_set_up_commands():
    text = README.read_bytes()
    assert 8000 <= len(text) <= 10240
    assert len(re.findall(rb"^python3 -m venv ", text, re.MULTILINE)) == 2


def test_the_stages_from_python(tiny, text_file, tmp_path, monkeypatch, capsys):
    code = replaced(
        block_with("calibrate("),
        ('"demo"', repr(str(tiny("llama-gqa")))),
        ("nsamples=128", f"dataset={str(text_file)!r}, nsamples=12, seqlen=24"),
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = sorted(path.name for path in Path("flap-run").iterdir())
    assert found == ["eval.json", "plan.yaml", "pruned", "stats.safetensors"]
    dense, pruned = re.findall(r"\{.*?: ([\d.]+)\}", capsys.readouterr().out)
    assert float(dense) != float(pruned)
