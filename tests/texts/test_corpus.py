"""Texts are read and cut as the contract and the authors say."""

import json
import os
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from support.models import tiny_tokenizer

from flapcli.errors import FlapError
from flapcli.texts.corpus import calibration_windows, evaluation_windows

TOKENIZER = tiny_tokenizer()
ROWS = ["the quick brown fox jumps", "over the lazy dog", "the fox jumps over the fox again and again"] * 8


def write_all_types(folder, column="text"):
    import pyarrow
    import pyarrow.parquet

    (folder / "a.txt").write_text("\n\n".join(ROWS))
    (folder / "a.jsonl").write_text("\n".join(json.dumps({column: row}) for row in ROWS) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({column: ROWS}), folder / "a.parquet")
    return [folder / f"a.{kind}" for kind in ("txt", "jsonl", "parquet")]


def test_file_types_give_the_same_windows(tmp_path):
    one, two, three = (
        calibration_windows(str(path), TOKENIZER, 4, 10, 0, "body") for path in write_all_types(tmp_path, "body")
    )
    assert one.tolist() == two.tolist() == three.tolist()
    ids = TOKENIZER("\n\n".join(ROWS)).input_ids
    whole = evaluation_windows(str(tmp_path / "a.txt"), TOKENIZER, 10)
    assert whole.flatten().tolist() == ids[: len(ids) // 10 * 10]


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    """Strings may hold Unicode's line separators as they are; a row without a text counts for nothing."""
    rows = ["one\u2028two three four", None, "five\x85six seven eight nine ten eleven"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "a.txt").write_text(f"{rows[0]}\n\n{rows[2]}", encoding="utf-8", newline="")
    one, two = (calibration_windows(str(tmp_path / name), TOKENIZER, 4, 4, 0) for name in ("a.jsonl", "a.txt"))
    assert one.tolist() == two.tolist()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_column_is_named(tmp_path, kind):
    write_all_types(tmp_path, "body")
    with pytest.raises(FlapError, match=r"no column 'text'.*--text-column"):
        calibration_windows(str(tmp_path / f"a.{kind}"), TOKENIZER, 4, 10, 0)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text"')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    for name, words in (("jsonl", "line 2"), ("parquet", "not a parquet file"), ("txt", "cannot read")):
        with pytest.raises(FlapError, match=words):
            calibration_windows(str(tmp_path / f"bad.{name}"), TOKENIZER, 4, 10, 0)


def test_pydoc_split_is_that_of_the_method():
    from pydoc_data.topics import topics

    ids = TOKENIZER("\n\n".join(topics.values())).input_ids
    cut = int(0.6 * len(ids))
    draw = random.Random(0)
    starts = [draw.randint(0, cut - 129) for _ in range(5)]
    windows = calibration_windows("pydoc", TOKENIZER, 5, 128, 0)
    assert windows.tolist() == [ids[s : s + 128] for s in starts]
    test = evaluation_windows("pydoc", TOKENIZER, 128)
    assert test.shape == (60, 128)
    assert test.flatten().tolist() == ids[cut : cut + 60 * 128]


@pytest.mark.parametrize("name", ["wikitext2", "ptb", "c4"])
def test_hub_texts_without_a_network_say_what_to_do(name):
    with pytest.raises(FlapError, match=r"can't be loaded.*use `pydoc` or a \.txt"):
        calibration_windows(name, TOKENIZER, 4, 10, 0)


def test_hub_texts_through_datasets(tmp_path):
    """The loading code of all three on local copies, which datasets finds under the hub's names."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    wikitext = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    wikitext.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [f"{split} {row}" for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), wikitext / f"{split}-00000-of-00001.parquet")
    (tmp_path / "Salesforce" / "wikitext" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
    )
    c4 = tmp_path / "allenai" / "c4" / "en"
    c4.mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        with gzip.open(c4 / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": row}) + "\n" for row in ROWS)
    for split in ("train", "test"):
        place = tmp_path / "ptb-text-only" / "ptb_text_only" / "penn_treebank" / split / "0000.parquet"
        place.parent.mkdir(parents=True)
        rows = [f"{split} {row}" for row in ROWS]
        pyarrow.parquet.write_table(pyarrow.table({"sentence": rows}), place)
    code = f"""
import json, random, sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
from support.models import tiny_tokenizer
from flapcli.texts.corpus import calibration_windows, evaluation_windows
t, rows = tiny_tokenizer(), {ROWS!r}
ids = t(" ".join("train " + row for row in rows)).input_ids
draw = random.Random(0)
starts = [draw.randint(0, len(ids) - 11) for _ in range(4)]
assert calibration_windows("wikitext2", t, 4, 10, 0).tolist() == [ids[s:s + 10] for s in starts]
ids = t("\\n\\n".join("test " + row for row in rows)).input_ids
assert evaluation_windows("wikitext2", t, 10).flatten().tolist() == ids[:len(ids) // 10 * 10]
ids = t(" ".join("test " + row for row in rows)).input_ids
assert evaluation_windows("ptb", t, 10).flatten().tolist() == ids[:len(ids) // 10 * 10]
draw, expected = random.Random(0), []
while len(expected) < 4:
    ids = t(rows[draw.randint(0, len(rows) - 1)]).input_ids
    if len(ids) > 6:
        s = draw.randint(0, len(ids) - 7)
        expected.append(ids[s:s + 6])
assert calibration_windows("c4", t, 4, 6, 0).tolist() == expected
"""
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


REQUESTS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, {}),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet",
            {"train": "penn_treebank/train/0000.parquet", "test": "penn_treebank/test/0000.parquet"}),
    "c4": ("allenai/c4", None, None, {"train": "en/c4-train.00000-of-01024.json.gz",
                                      "validation": "en/c4-validation.00000-of-00008.json.gz"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_asked_of_the_hub(name, split, monkeypatch):
    import datasets

    from flapcli.texts.corpus import tokens_of

    asked = {}

    def load(repo, config=None, **request):
        asked.update(request, repo=repo, config=config)
        return {"text": ROWS, "sentence": ROWS}

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokens_of(name, TOKENIZER, split, "text")
    repo, config, revision, files = REQUESTS[name]
    theirs = "validation" if (name, split) == ("c4", "test") else split
    expected = {"repo": repo, "config": config, "revision": revision, "split": theirs}
    assert asked == expected | ({"data_files": {theirs: files[theirs]}} if files else {})


CHAT = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "the quick brown fox"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def rows_of(path, tokenizer):
    from flapcli.texts.corpus import tokens_of

    return tokenizer.decode(tokens_of(str(path), tokenizer, "train", "text"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_go_through_the_template(kind, tmp_path):
    tokenizer, path = tiny_tokenizer(), tmp_path / f"chats.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": CHAT}) for _ in range(2)))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [CHAT, CHAT]}), path)
    with pytest.raises(FlapError, match="chat messages that the tokenizer can't lay out: it has no chat template"):
        rows_of(path, tokenizer)
    tokenizer.chat_template = TEMPLATE
    said = "<user>fox?\n<assistant>the quick brown fox\n"
    assert rows_of(path, tokenizer) == f"{said}\n\n{said}"
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(FlapError, match="can't lay out"):
        rows_of(path, tokenizer)


def test_bytes_are_utf_8(tmp_path):
    path = tmp_path / "bytes.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["füchse".encode(), b"the lazy dog"]}), path)
    assert rows_of(path, tiny_tokenizer()) == "füchse\n\nthe lazy dog"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff\xfe"]}), path)
    with pytest.raises(FlapError, match="row 1 is no text in UTF-8"):
        rows_of(path, tiny_tokenizer())


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}, ["a"], []])
def test_what_is_no_text_is_refused(value, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "the fox"}) + "\n" + json.dumps({"text": value}))
    with pytest.raises(FlapError, match=rf"line 2 holds {type(value).__name__}, where text or chat messages"):
        rows_of(path, tiny_tokenizer())


def test_byte_order_marks_and_lone_surrogates(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "the fox"}).encode())
    assert rows_of(path, tiny_tokenizer()) == "the fox"
    path.write_text('{"text": "half \\ud83d"}')
    with pytest.raises(FlapError, match="line 1 is no text in UTF-8"):
        rows_of(path, tiny_tokenizer())
