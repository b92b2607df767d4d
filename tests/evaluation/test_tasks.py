"""lm-eval's tasks on local data: equal to what transformers alone computes, and honest where they can't be run."""

import json

import pytest
import torch
from support.models import load_dense, load_tokenizer

from flapcli.artifacts.eval_report import EvalReport, Measurement
from flapcli.evaluation.task_names import average, expand, main_metric

CHOICES = [
    ("The sky on a clear day is", ["blue", "made of wood", "a dog"], 0),
    ("Two plus two is", ["a bird", "four", "seven hundred"], 1),
    ("Fire is", ["cold as ice", "hot", "wet"], 1),
    ("Paris is the capital of", ["Spain", "Japan", "France"], 2),
]
TEXTS = ["the quick brown fox", "jumps over the lazy dog", "a dog is lazy"]


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def write_tasks(folder):
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in CHOICES]
    (folder / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "mc.yaml").write_text(f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/mc.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (folder / "text.yaml").write_text(f"""
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    (folder / "gone.yaml").write_text(f"""
task: local_gone
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/nowhere.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "x"
doc_to_choice: ["a", "b"]
doc_to_target: 0
""")
    (folder / "group.yaml").write_text("""
group: local_group
task: [local_choice, local_text]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
""")
    return folder


def loglikelihood(model, tokenizer, context, text):
    """Sum of log probabilities of `text`'s tokens after `context` (or the first token alone where it is empty)."""
    before = tokenizer(context).input_ids or [tokenizer.bos_token_id]
    ids = torch.tensor([before + tokenizer(text).input_ids])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1]
    return float(logprobs.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum())


def expected(model, tokenizer):
    scores = [[loglikelihood(model, tokenizer, q, " " + c) for c in choices] for q, choices, _ in CHOICES]
    lengths = [[len(c) for c in choices] for _, choices, _ in CHOICES]
    norms = [[s / n for s, n in zip(*row, strict=True)] for row in zip(scores, lengths, strict=True)]
    right = [
        [max(range(3), key=row.__getitem__) == a for row, (_, _, a) in zip(table, CHOICES, strict=True)]
        for table in (scores, norms)
    ]
    bits = -sum(loglikelihood(model, tokenizer, "", text) for text in TEXTS) / torch.log(torch.tensor(2.0))
    return {
        "acc": sum(right[0]) / 4,
        "acc_norm": sum(right[1]) / 4,
        "bits_per_byte": float(bits) / sum(len(text.encode()) for text in TEXTS),
    }


@pytest.mark.parametrize("batch", ["1", "auto"])
def test_tasks_equal_transformers_alone(batch, tiny, prune, flap, text_file, task_files, tmp_path):
    run = prune(tiny("llama-gqa"), tmp_path / "run")
    arguments = ["--perplexity", text_file, "--seqlen", 16, "--include-path", task_files]
    flap("eval", "-d", run, *arguments, "--tasks", "local_choice,local_text", "--batch-size", batch)
    report = json.loads((run / "eval.json").read_text())
    want = expected(load_dense(tiny("llama-gqa")), load_tokenizer(tiny("llama-gqa")))
    dense = report["baseline"]["tasks"]
    for metric in ("acc", "acc_norm"):
        assert dense["local_choice"][metric] == want[metric]
        share = want[metric]
        assert dense["local_choice"][f"{metric}_stderr"] == pytest.approx((share * (1 - share) / 3) ** 0.5)
    assert dense["local_text"]["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-4)
    assert report["baseline"]["task_average"] == want["acc_norm"]
    assert report["tasks"]["local_text"]["bits_per_byte"] != pytest.approx(want["bits_per_byte"], rel=1e-3)
    assert set(report["perplexity"]) == {str(text_file)}
    again = flap("eval", "-d", run, *arguments, "--tasks", "local_choice,local_text", "--batch-size", batch)
    assert "up to date" in again.stderr


def test_limit_and_fewshot_reach_lm_eval(tiny, flap, text_file, task_files, tmp_path, monkeypatch):
    from flapcli.evaluation import tasks

    shots, evaluate = [], tasks.evaluator.simple_evaluate

    def noting(*args, **kwargs):
        shots.append(kwargs["num_fewshot"])
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(tasks.evaluator, "simple_evaluate", noting)
    arguments = ["--no-baseline", "--perplexity", text_file, "--seqlen", 16, "--include-path", task_files]
    found, used = {}, {}
    for name, more in (("all", []), ("two", ["--limit", 2]), ("shots", ["--num-fewshot", 2])):
        out = tmp_path / f"{name}.json"
        flap("eval", tiny("llama-gqa"), *arguments, "--tasks", "local_text,local_choice", "--out", out, *more)
        found[name] = json.loads(out.read_text())["tasks"]
        used[name] = set(shots)
        shots.clear()
    model, tokenizer = load_dense(tiny("llama-gqa")), load_tokenizer(tiny("llama-gqa"))
    bits = -sum(loglikelihood(model, tokenizer, "", text) for text in TEXTS[:2]) / float(torch.log(torch.tensor(2.0)))
    size = sum(len(text.encode()) for text in TEXTS[:2])
    assert found["two"]["local_text"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)
    assert used == {"all": {None}, "two": {None}, "shots": {2}}
    assert found["shots"]["local_text"] == found["all"]["local_text"]  # no prompt, so examples change nothing


def test_a_group_counts_once_in_the_average(tiny, flap, text_file, task_files, tmp_path):
    out = tmp_path / "eval.json"
    flap("eval", tiny("llama-gqa"), "--no-baseline", "--perplexity", text_file, "--seqlen", 16, "--out", out,
         "--include-path", task_files, "--tasks", "local_group")  # fmt: skip
    report = json.loads(out.read_text())
    assert set(report["tasks"]) == {"local_group", "local_choice", "local_text"}
    assert report["averaged_tasks"] == ["local_group"]
    assert report["task_average"] == report["tasks"]["local_choice"]["acc"]


def test_unknown_names_are_refused_before_any_model(flap, tmp_path, task_files):
    result = flap(
        "eval", tmp_path / "no-model", "--tasks", "hellaswagg,local_choic,boolq", "--include-path", task_files,
        "-d", tmp_path, code=2,
    )  # fmt: skip
    assert "hellaswag," in result.stderr
    assert "local_choice" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "--tasks" in flap("eval", tmp_path / "no-model", "--tasks", " ,", "-d", tmp_path, code=2).stderr
    for command in ("eval", "sweep"):
        assert "--tasks" in flap(command, tmp_path / "no-model", "--tasks", "", "-d", tmp_path, code=2).stderr
    missing = flap("eval", "-d", tmp_path, "--tasks", "boolq", "--include-path", tmp_path / "nowhere", code=2)
    assert "--include-path" in missing.stderr


def test_a_task_without_data_is_refused_before_anything_is_computed(tiny, flap, text_file, task_files, tmp_path):
    tasks = ["--include-path", task_files, "--tasks", "local_gone,local_choice"]
    for command in (
        ["eval", tiny("qwen2"), "--no-baseline", "--perplexity", text_file, "--out", tmp_path / "eval.json"],
        ["run", tiny("qwen2"), "-d", tmp_path / "run", "--dataset", text_file],
        ["sweep", tiny("qwen2"), "-d", tmp_path / "run", "--dataset", text_file],
    ):
        [line] = flap(*command, *tasks, code=1).stderr.splitlines()
        assert "the data of 1 tasks can't be loaded (local_gone)" in line
        assert "nowhere.jsonl" in line
    assert list(tmp_path.iterdir()) == []


def test_zero_shot_without_a_network_is_refused_first(tiny, flap, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    result = flap("run", tiny("qwen2"), "-d", tmp_path / "run", "--dataset", text_file, "--tasks", "zero-shot", code=1)
    assert "the data of 7 tasks can't be loaded (boolq, " in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_task_that_fails_is_one_line_and_the_others_stay(tiny, flap, text_file, task_files, tmp_path, monkeypatch):
    from flapcli.evaluation import tasks

    evaluate, out = tasks.evaluator.simple_evaluate, tmp_path / "eval.json"

    def failing(*args, **kwargs):
        if kwargs["model"].name.endswith("local_text"):
            raise KeyError("a task's own code")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(tasks.evaluator, "simple_evaluate", failing)
    command = ["eval", tiny("qwen2"), "--no-baseline", "--perplexity", text_file, "--seqlen", 16, "--out", out,
               "--include-path", task_files, "--tasks", "local_text,local_choice"]  # fmt: skip
    result = flap(*command, code=1)
    [line] = [line for line in result.stderr.splitlines() if "local_text" in line and "not every task" not in line]
    assert line.startswith("task local_text: ")
    report = json.loads(out.read_text())
    assert set(report["tasks"]) == {"local_choice"}
    assert "own code" in report["task_failures"]["local_text"]
    dense = {key: value for key, value in report.items() if key in Measurement.model_fields}
    report |= {"baseline": dense, "task_failures": {}}  # failed on the dense model alone
    assert set(EvalReport.model_validate(report).all_failures) == {"local_text"}
    told = flap("run", tiny("qwen2"), "-d", tmp_path / "run", "--dataset", text_file, "--nsamples", 3, *command[3:7],
                *command[9:], "--json", code=1)  # fmt: skip
    assert set(json.loads(told.stdout)["eval"]["tasks"]) == {"local_choice"}
    assert report["perplexity"]
    monkeypatch.undo()
    assert "up to date" not in flap(*command).stderr  # a failure is tried again
    assert set(json.loads(out.read_text())["tasks"]) == {"local_text", "local_choice"}


def test_cached_requests_are_used_and_follow_edited_files(tiny, flap, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_tasks(folder)
    command = ["eval", tiny("llama-gqa"), "--no-baseline", "--perplexity", text_file, "--seqlen", 16,
               "--out", tmp_path / "eval.json", "--include-path", folder, "--tasks", "local_text"]  # fmt: skip

    def bits(*more):
        flap(*command, *more)
        return json.loads((tmp_path / "eval.json").read_text())["tasks"]["local_text"]["bits_per_byte"]

    plain = bits()
    assert not (tmp_path / "cache" / "flap").exists()
    assert bits("--force", "--cache-requests") == plain
    [kept] = (tmp_path / "cache" / "flap").rglob("*.pickle")
    before = kept.stat().st_mtime_ns
    assert bits("--limit", "3", "--cache-requests") == plain
    assert kept.stat().st_mtime_ns == before
    (folder / "text.jsonl").write_text(json.dumps({"text": "zzz qqq xxx"}))
    assert bits("--cache-requests") != plain


def test_zero_shot_is_the_papers_seven_with_its_metrics():
    names = expand("zero-shot,boolq,mine")
    assert len(names) == 8
    found = {name: main_metric(name, {"acc": 0.1, "acc_norm": 0.2}) for name in names}
    normalised = {name for name, metric in found.items() if metric == "acc_norm"}
    assert normalised == {"hellaswag", "arc_challenge", "openbookqa", "mine"}
    tasks = {"boolq": {"acc": 0.4}, "hellaswag": {"acc": 0.1, "acc_norm": 0.6}, "wiki": {"word_perplexity": 900.0}}
    assert average(tasks) == (["boolq", "hellaswag"], pytest.approx(0.5))
    assert average({"wiki": {"word_perplexity": 900.0}}) == ([], None)


def test_the_real_model_answers_easy_questions(flap, task_files, text_file, tmp_path):
    out = tmp_path / "eval.json"
    flap("eval", "demo", "--no-baseline", "--perplexity", text_file, "--perplexity-windows", 1, "--out", out,
         "--include-path", task_files, "--tasks", "local_choice,local_text")  # fmt: skip
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks["local_choice"]["acc"] == 1
    assert 0.5 < tasks["local_text"]["bits_per_byte"] < 3
