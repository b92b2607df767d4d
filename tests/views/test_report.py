"""The page holds everything it shows, the commands on it make the run anew, and pictures are drawn."""

import shlex
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from flapcli.artifacts.eval_report import load_report
from flapcli.artifacts.plan import load_plan
from flapcli.views.eval_rows import story
from flapcli.views.page import number

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags that are not closed, addresses that the page asks for, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.words, self.tags, self.alts = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.alts += [value for name, value in attributes if name == "aria-label"]
        self.asked += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tiny, prune, flap, text_file, tmp_path_factory):
    folder = prune(tiny("llama-gqa"), tmp_path_factory.mktemp("report") / "run", "--ratio 0.3")
    flap("eval", "-d", folder, "--perplexity", text_file, "--seqlen", 16, "--speed", "--speed-rounds", 1,
         "--speed-lengths", "8", "--speed-new-tokens", 2, "--divergence")  # fmt: skip
    return folder


def test_the_page_is_whole_and_asks_for_nothing(run, flap, tmp_path):
    out = tmp_path / "page.html"
    flap("report", "-d", run, "--out", out, "--compare", run)
    text = out.read_text()
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("#") for address in page.asked)
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(http" not in text
    words = " ".join(page.words)
    plan = load_plan(run / "plan.yaml")
    assert f"{plan.ratio.achieved:.2%}" in words
    headings = ("What was pruned", "Scores", "quality", "size, speed and memory", "Beside other runs", "versions")
    for heading in (*headings, "equal next tokens"):
        assert heading in words
    assert page.tags.count("svg") == 3  # what stays, scores, gain
    assert len(page.alts) == 3 and all(page.alts)
    layer = plan.layers[0].attention
    assert f"layer 0: {plan.counts('attention')[0]} of {layer.of} KV groups kept ({layer.keep})" in words  # on hover
    assert "#000000" not in text  # but what follows a dark page


def commands_of(run, flap):
    """What the page says to type, as words."""
    flap("report", "-d", run)
    text = "".join(Page((run / "report.html").read_text()).words).replace("\\\n", "")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("flap ")]


def test_the_commands_on_the_page_make_the_run_anew(run, flap, tmp_path):
    *lines, evaluation = commands_of(run, flap)
    assert [words[0] for words in (*lines, evaluation)] == ["calibrate", "plan", "apply", "eval"]
    assert {"--speed-new-tokens", "--divergence"} < set(evaluation) and "--perplexity" not in evaluation
    for words in lines:
        flap(*(str(tmp_path / "again") if word == str(run) else word for word in words))
    plans = [load_plan(folder / "plan.yaml") for folder in (run, tmp_path / "again")]
    assert plans[0].layers == plans[1].layers
    weights = [(folder / "pruned" / "model-00001-of-00001.safetensors") for folder in (run, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "typed",
    [
        "--nsamples 8 --seed 3 --divergence",
        "--preset paper --ratio 0.3 --nsamples 12 --compensate none --round-to 8 --store-dtype bfloat16 --no-baseline",
        "--nsamples 8 --target-params 60000 --perplexity pydoc --perplexity-windows 2 --eval-dtype float32",
    ],
)
def test_the_page_says_what_was_typed(typed, tiny, flap, text_file, tmp_path):
    words = [str(tiny("llama-gqa")), "-d", str(tmp_path / "run"), "--dataset", str(text_file), "--seqlen", "16"]
    words += [*typed.split(), *([] if "--perplexity " in typed else ["--perplexity-windows", "3"])]
    flap("run", *words)
    [said] = commands_of(tmp_path / "run", flap)
    assert said[:4] == ["run", *words[:3]]
    assert sorted(said[4:]) == sorted(words[3:])


def test_a_sweep_is_reported(tiny, flap, text_file, tmp_path):
    words = [str(tiny("llama-gqa")), "-d", str(tmp_path / "run"), "--ratios", "0.1,0.3", "--dataset", str(text_file)]
    words += ["--nsamples", "8", "--seqlen", "16", "--perplexity-windows", "4", "--compensate", "none"]
    flap("sweep", *words)
    [said] = commands_of(tmp_path / "run", flap)
    assert (said[0], sorted(said[1:])) == ("sweep", sorted(words))
    page = Page((tmp_path / "run" / "report.html").read_text())
    words = " ".join(page.words)
    assert "Several ratios" in words and "Recommended: 0.3" in words and "Not measured" not in words
    assert page.open == [] and page.tags.count("svg") == 1


def test_artifacts_that_do_not_belong_together_are_named(tiny, prune, flap, tmp_path, text_file):
    run = prune(tiny("llama-mha"), tmp_path / "run")
    flap("report", "-d", run)
    assert 'class="warn"' not in (run / "report.html").read_text()
    assert "Not measured yet" in (run / "report.html").read_text()
    flap("plan", "-d", run, "--ratio", "0.5")
    flap("report", "-d", run)
    assert "pruned/ was made by another plan" in (run / "report.html").read_text()
    small = ("--dataset", text_file, "--nsamples", 4, "--seqlen", 16)
    flap("calibrate", tiny("qwen3"), "-d", run, *small)  # of other sizes: its scores would be drawn over this plan
    flap("report", "-d", run)
    page = (run / "report.html").read_text()
    assert "plan.yaml was made from other statistics" in page
    assert "Scores" not in page


def test_names_are_escaped(tiny, prune, flap, tmp_path):
    run = prune(tiny("llama-mha"), tmp_path / "run")
    path = run / "plan.yaml"
    path.write_text(path.read_text().replace(f"name: {tiny('llama-mha')}", 'name: "<script>alert(1)</script>"'))
    flap("report", "-d", run)
    text = (run / "report.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_pictures(run, flap, tmp_path):
    flap("show", run, "--plot", tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    flap("show", run / "plan.yaml", "--plot", tmp_path / "kept.svg")
    assert ElementTree.parse(tmp_path / "kept.svg").getroot().tag.endswith("svg")
    assert "of its prunable weights removed" in (tmp_path / "kept.svg").read_text()
    assert "dc:date" not in (tmp_path / "kept.svg").read_text()  # equal plans give equal pictures
    assert "--plot" in flap("show", run, "--plot", tmp_path / "kept.pdf", code=2).stderr
    assert "no plan" in flap("show", run / "stats.safetensors", "--plot", tmp_path / "a.png", code=1).stderr


def test_a_masked_model_keeps_its_parameters(run):
    report = load_report(run / "eval.json")
    masked = report.model_copy(update={"size": report.baseline.size})
    assert story(masked, load_plan(run / "plan.yaml"))[0].endswith("% of what can be pruned set to zero")


def test_a_folder_without_a_run_is_one_line(flap, tmp_path):
    assert "neither plan.yaml nor eval.json nor sweep.json" in flap("report", "-d", tmp_path, code=1).stderr


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1234567, "1,234,567"), (0.2, "0.2000"), (31.949, "31.95"), ("pydoc", "pydoc")]
)
def test_numbers_read_well(value, text):
    assert number(value) == text
