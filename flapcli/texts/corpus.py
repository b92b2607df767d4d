"""Text sources, and the token windows that calibration and perplexity read."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from flapcli.checkpoints import DEMO
from flapcli.checkpoints.hub_errors import why
from flapcli.errors import FlapError, UsageError, first_line, meant
from flapcli.storage.hashing import sha256
from flapcli.texts.opening import opening, room_for_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Windows = NDArray[np.int64]
T = TypeVar("T", NDArray[np.int64], range)
Split = Literal["train", "test"]
PYDOC_TRAIN_SHARE = 0.6
C4_TEST_DOCUMENTS = 1100  # as the authors: the validation file's first documents, joined
HELD_OUT_SHARE, HELD_OUT_WINDOWS = 0.05, 4  # of a text, and at least so many windows of it
TEST_WINDOWS = {"pydoc": 60, "c4": 256}  # the first so many, of others all
FILE_TYPES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class HubText:
    """A dataset of the hub: the authors join its rows to one text, those of its train split by a space.

    `revision` is for a dataset that is a script, which datasets 4 does not run: the hub's own conversion of it.
    """

    repo: str
    config: str | None
    column: str
    test_joint: str = " "
    test_split: str = "test"
    files: dict[Split, str] | None = None
    revision: str | None = None


HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", test_joint="\n\n"),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only", None, "sentence", revision="refs/convert/parquet",
        files={"train": "penn_treebank/train/0000.parquet", "test": "penn_treebank/test/0000.parquet"},
    ),
    "c4": HubText(
        "allenai/c4", None, "text", test_split="validation",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
    ),
}  # fmt: skip
NAMED = (*HUB_TEXTS, "pydoc")


def check_source(source: str, option: str, names: Sequence[str] = NAMED) -> None:
    """Raise UsageError unless `source` is one of `names` or an existing file of a type we read."""
    if source in names:
        return
    path = Path(source)
    if path.suffix not in FILE_TYPES:
        kinds = f"{', '.join(names)} or a file that ends in {', '.join(FILE_TYPES)}"
        raise UsageError(f"{option} {source}: give {kinds}{meant(source, names)}")
    if not isfile(path):  # which is False for what is too long to be a name
        raise UsageError(f"{option} {source}: no such file")


def may_hold_chats(source: str) -> bool:
    """Whether a text is of rows, which chat templates lay out where they are chats."""
    return Path(source).suffix in FILE_TYPES[1:]


def source_sha256(source: str) -> str | None:
    """Hash of a text on this machine; None for one from the hub."""
    if source in HUB_TEXTS:
        return None
    if source == "pydoc":
        return hashlib.sha256(_pydoc().encode()).hexdigest()
    try:
        return sha256(Path(source))
    except OSError as error:
        raise FlapError(f"cannot read {source}: {error.strerror}") from error


def calibration_windows(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    nsamples: int,
    seqlen: int,
    seed: int,
    column: str = "text",
    held_out: bool | None = None,
) -> Windows:
    """`nsamples` random windows of `seqlen` tokens, (nsamples, seqlen), drawn by `seed` as the authors do.

    Each begins with what the tokenizer puts before every text. `held_out`: from the end of the text alone, which is
    kept for validation, or from what comes before it. Raises FlapError where the text can't be had or is too short for
    a single window, UsageError where windows are too short for any text.
    """
    draw, first = random.Random(seed), opening(tokenizer)
    length = room_for_text(first, seqlen)
    if source == "c4":
        return _opened(_parts_of_documents(tokenizer, nsamples, length, draw, held_out), first)
    ids = _part(tokens_of(source, tokenizer, "train", column), HELD_OUT_WINDOWS * length, held_out)
    last = len(ids) - length - 1
    if last < 0:
        raise FlapError(
            f"{source}: too little text: {len(ids)} tokens, drawing a window takes {length + 1}; lower --seqlen"
        )
    starts = [draw.randint(0, last) for _ in range(nsamples)]
    return _opened(np.stack([ids[start : start + length] for start in starts]), first)


def _part(whole: T, least: int, held_out: bool | None) -> T:
    """The end of a text that is held out, `least` tokens or more unless that is over half of it; or what is not."""
    if held_out is None:
        return whole
    cut = len(whole) - max(int(HELD_OUT_SHARE * len(whole)), min(least, len(whole) // 2))
    return whole[cut:] if held_out else whole[:cut]


def evaluation_windows(source: str, tokenizer: "PreTrainedTokenizerBase", seqlen: int, column: str = "text") -> Windows:
    """The text's test windows (METHOD.md, Perplexity) in order, without overlap, (n, seqlen); a file is read whole.

    Raises as `calibration_windows`.
    """
    first = opening(tokenizer)
    length = room_for_text(first, seqlen)
    ids = tokens_of(source, tokenizer, "test", column)
    count = len(ids) // length
    if count == 0:
        raise FlapError(
            f"{source}: too little text for perplexity: {len(ids)} tokens, a window takes {length}; lower --seqlen"
        )
    return _opened(ids[: count * length].reshape(count, length)[: TEST_WINDOWS.get(source)], first)


def spread(windows: Windows, most: int | None) -> Windows:
    """At most so many of `windows`, evenly spread over the text; all for None."""
    if most is None or len(windows) <= most:
        return windows
    return windows[np.linspace(0, len(windows) - 1, most).round().astype(int)]


def _opened(texts: Windows, first: list[int]) -> Windows:
    """Parts of a text, (n, length), as windows that begin with the tokens `first`."""
    return np.concatenate([np.tile(np.asarray(first, np.int64), (len(texts), 1)), texts], axis=1)


def tokens_of(source: str, tokenizer: "PreTrainedTokenizerBase", split: Split, column: str) -> NDArray[np.int64]:
    """Token ids of a whole text, without what the tokenizer puts before it, which windows begin with."""
    if source == "pydoc":
        ids = _encode(tokenizer, _pydoc())
        cut = int(PYDOC_TRAIN_SHARE * len(ids))
        return ids[:cut] if split == "train" else ids[cut:]
    if source in HUB_TEXTS:
        rows = _hub_rows(source, split)[: C4_TEST_DOCUMENTS if source == "c4" else None]
        joint = HUB_TEXTS[source].test_joint if split == "test" else " "
        return _encode(tokenizer, joint.join(rows))
    return _encode(tokenizer, _file_text(Path(source), column, tokenizer))


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> NDArray[np.int64]:
    ids, first = tokenizer(text).input_ids, opening(tokenizer)
    while first and ids[: len(first)] == first:  # a chat template may have written it too
        ids = ids[len(first) :]
    return np.asarray(ids, dtype=np.int64)


@cache
def _pydoc() -> str:
    """Python's own language reference, which every machine has (METHOD.md, Perplexity)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def _parts_of_documents(
    tokenizer: "PreTrainedTokenizerBase", count: int, length: int, draw: random.Random, held_out: bool | None
) -> Windows:
    """c4 as the authors draw it: a random document that is long enough, then a random part of it; (count, length)."""
    rows = _hub_rows("c4", "train")
    places = _part(range(len(rows)), 1, held_out)
    parts: list[NDArray[np.int64]] = []
    tries = 0
    while len(parts) < count:
        ids = _encode(tokenizer, rows[draw.randint(places[0], places[-1])])
        tries += 1
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            parts.append(ids[start : start + length])
        elif tries > 1000 * (len(parts) + 1):
            raise FlapError(f"c4: too little text: hardly a document has {length + 1} tokens; lower --seqlen")
    return np.stack(parts)


def _hub_rows(name: str, split: Split) -> Sequence[str]:
    """The text column of a hub dataset's split, from the network or datasets' cache."""
    import datasets

    text = HUB_TEXTS[name]
    theirs = text.test_split if split == "test" else split
    files = {"data_files": {theirs: text.files[split]}} if text.files else {}
    try:
        rows = datasets.load_dataset(text.repo, text.config, split=theirs, revision=text.revision, **files)
    except Exception as error:  # datasets raises a dozen kinds, among them bare ValueError and OSError
        absent = " and no copy is in datasets' cache; without a network use `pydoc` or a .txt, .jsonl or .parquet file"
        raise FlapError(f"{name} ({text.repo} on the hub) can't be loaded: {why(error, absent)}") from error
    return rows[text.column]


def _file_text(path: Path, column: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A user's text: a .txt as it is, rows of .jsonl and .parquet joined by empty lines; chats by the template."""
    try:
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8-sig")
        rows = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[path.suffix](path, column)
        return "\n\n".join(_row_text(row, where, tokenizer) for where, row in rows if row is not None)
    except (OSError, UnicodeDecodeError) as error:
        raise FlapError(f"cannot read {path} as text: {error}") from error


def _row_text(row: Any, where: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What a row says: text, bytes of UTF-8, or the messages of a chat. Raises FlapError for anything else."""
    try:
        text = row.decode() if isinstance(row, bytes) else _chat_text(row, tokenizer) if _is_chat(row) else row
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeError as error:
        raise FlapError(f"{where} is no text in UTF-8: {error}") from error
    except Exception as error:  # a template may raise what it likes
        raise FlapError(f"{where} holds chat messages that the tokenizer can't lay out: {first_line(error)}") from error
    raise FlapError(
        f"{where} holds {type(row).__name__}, where text or chat messages (a list of role and content) are wanted: "
        "name another column with --text-column"
    )


def _is_chat(row: Any) -> bool:
    said = {"role", "content"}
    return isinstance(row, list) and bool(row) and all(isinstance(turn, dict) and said <= turn.keys() for turn in row)


def _chat_text(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise ValueError("it has no chat template")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _jsonl_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and what its column holds."""
    # Not splitlines, which breaks strings at the separators of Unicode.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)[column]
        except (ValueError, TypeError, RecursionError) as error:
            raise FlapError(f"{where}: not a JSON object") from error
        except KeyError as error:
            raise FlapError(f"{where}: no column {column!r}; name one with --text-column") from error


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and what its column holds."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise FlapError(f"{path}: no column {column!r} among {', '.join(names)}; name one with --text-column")
        table = pyarrow.parquet.read_table(path, columns=[column])
    except pyarrow.ArrowException as error:
        raise FlapError(f"{path} is not a parquet file or is corrupt: {error}") from error
    for number, row in enumerate(table[column].to_pylist(), 1):
        yield f"{path}, row {number}", row


def default_text(model: str) -> str:
    """The text of `--dataset` and `--perplexity` where none is given: pydoc for the demo, else wikitext2."""
    return "pydoc" if model == DEMO else "wikitext2"
