"""Names are data: what looks like markup in a model's, file's or folder's name is printed as it is."""

import shutil

import pytest

from flapcli.views.display import Display

NAME = "m[red]o[/b]d:smile:[link=x]"


@pytest.fixture
def run(tiny, flap, text_file, tmp_path):
    model = shutil.copytree(tiny("llama-gqa"), tmp_path / NAME.replace("/", "-"))
    text = shutil.copyfile(text_file, tmp_path / "[bold]t[-b].txt")
    folder = tmp_path / "r[red]"
    flap("run", model, "-d", folder, "--dataset", text, "--perplexity", text, "--nsamples", 4, "--seqlen", 16)
    return folder


def test_every_table_prints_names_as_they_are(run, flap, monkeypatch):
    from flapcli.views import terminal

    monkeypatch.setattr(terminal.out, "width", 400)
    model, text = NAME.replace("/", "-"), "[bold]t[-b].txt"
    for arguments, names in {
        ("show", run): (model, text, "r[red]"),
        ("compare", run, run): (model, text, "r[red]"),
        ("diff", run, run / "plan.yaml"): (),
        ("show", run / "plan.yaml"): (model,),
    }.items():
        said = "".join(flap(*arguments).stdout.split())  # a title wraps where its table is narrow
        assert all(name in said for name in names), said


def test_bars_take_any_name():
    with Display("[/b]").task("pruned on [/b].txt", 2, "tokens") as advance:
        advance(2)
