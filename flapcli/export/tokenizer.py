"""A tokenizer in the form that GGUF keeps it: tokens, types, merges or scores, special tokens, chat template."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf import GGUFReader, GGUFValueType, Keys, TokenType

from flapcli.errors import FlapError
from flapcli.texts.opening import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPECIALS = {
    "bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID, "pad": Keys.Tokenizer.PAD_ID,
}  # fmt: skip
# Merges join two tokens by a space, so a space inside a token is written as byte-level BPE writes that byte.
ENCODED_SPACE = chr(ord(" ") + 256)


class Field(NamedTuple):
    """One metadata entry of a GGUF; `inner` is the type of an array's elements."""

    key: str
    value: Any
    kind: GGUFValueType
    inner: GGUFValueType | None = None


def copied(reader: GGUFReader) -> list[Field]:
    """The tokenizer of another GGUF as it stands there."""
    fields = []
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            fields.append(Field(field.name, field.contents(), field.types[0], inner))
    return fields


def converted(tokenizer: "PreTrainedTokenizerBase", size: int, where: str) -> tuple[list[Field], list[str]]:
    """A transformers tokenizer for an embedding of `size` rows, and what people should know about it.

    Raises FlapError where llama.cpp has no equivalent of it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise FlapError(f"{where}: its tokenizer has no tokenizer.json, which the export reads")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise FlapError(f"{where}: its tokenizer is {model['type']}; the export knows BPE")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    tokens, types = _tokens(tokenizer, spec, size, where)
    fields = [
        _array(Keys.Tokenizer.LIST, tokens, GGUFValueType.STRING),
        _array(Keys.Tokenizer.TOKEN_TYPE, types, GGUFValueType.INT32),
    ]
    notes: list[str] = []
    if model.get("byte_fallback"):
        fields += _sentencepiece(spec, merges, tokens, where)
    else:
        pre = _pretokenizer(spec, where)
        if pre.get("ignore_merges", False) != bool(model.get("ignore_merges")):
            notes.append(f"tokenizer.json says ignore_merges {bool(model.get('ignore_merges'))} and llama.cpp's "
                         f"{pre['pre']} does the other: rare words may be split into other tokens")  # fmt: skip
        joined = [" ".join(part.replace(" ", ENCODED_SPACE) for part in pair) for pair in merges]
        fields += [
            _string(Keys.Tokenizer.MODEL, "gpt2"),
            _string(Keys.Tokenizer.PRE, pre["pre"]),
            _array(Keys.Tokenizer.MERGES, joined, GGUFValueType.STRING),
            Field(Keys.Tokenizer.ADD_PREFIX, False, GGUFValueType.BOOL),
        ]
    return fields + _specials(tokenizer), notes


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", spec: dict[str, Any], size: int, where: str
) -> tuple[list[str], list[int]]:
    """Every row's token and its type; rows that no token has are padding."""
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise FlapError(f"{where}: its tokenizer has ids up to {max(by_id)}, its embedding only {size} rows")
    kinds = {i: TokenType.NORMAL for i in by_id}
    if spec["model"].get("byte_fallback"):
        kinds |= {i: TokenType.BYTE for i, token in by_id.items() if BYTE.fullmatch(token)}
    for added in spec["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if tokenizer.unk_token_id is not None and spec["model"].get("byte_fallback"):
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    return tokens, [int(kinds.get(i, TokenType.UNUSED)) for i in range(size)]


def _pretokenizer(spec: dict[str, Any], where: str) -> dict[str, Any]:
    """llama.cpp's name of the rules that split text before BPE, found by the rules themselves."""
    known = json.loads((Path(__file__).parent / "pretokenizers.json").read_text(encoding="utf-8"))
    found = _flat(spec["pre_tokenizer"] or {"type": "none"})
    fitting = [row for row in known if row["steps"] == found]
    exact = [row for row in fitting if row.get("ignore_merges", False) == bool(spec["model"].get("ignore_merges"))]
    for row in exact + fitting:
        return dict(row)
    kinds = ", ".join(step["type"] for step in found)
    names = ", ".join(row["pre"] for row in known)
    raise FlapError(f"{where}: the pre-tokenizer of its tokenizer.json ({kinds}) is none of: {names}")


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer in order, without what changes no token (offsets)."""
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _flat(part)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _sentencepiece(spec: dict[str, Any], merges: list[list[str]], tokens: list[str], where: str) -> list[Field]:
    """BPE as sentencepiece has it: llama.cpp merges by the score of the result, which is the merge's rank here."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    metaspace = pre.get("type") == "Metaspace"
    replaces = any(s.get("type") == "Replace" and s.get("content") == SPACE for s in steps)
    idle = replaces and pre.get("pattern") == {"String": " "}  # splits at spaces, of which none are left
    if not (metaspace or replaces) or (pre and not metaspace and not idle):
        raise FlapError(f"{where}: its tokenizer has byte fallback but is not sentencepiece's")
    prefix = any(s.get("type") == "Prepend" for s in steps) or (metaspace and pre.get("prepend_scheme") != "never")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return [
        _string(Keys.Tokenizer.MODEL, "llama"),
        _string(Keys.Tokenizer.PRE, "default"),
        _array(Keys.Tokenizer.SCORES, scores, GGUFValueType.FLOAT32),
        Field(Keys.Tokenizer.ADD_PREFIX, prefix, GGUFValueType.BOOL),
    ]


def _specials(tokenizer: "PreTrainedTokenizerBase") -> list[Field]:
    """Special tokens, which of them the tokenizer adds by itself, and the chat template."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIALS}
    fields = [Field(SPECIALS[name], i, GGUFValueType.UINT32) for name, i in ids.items() if i is not None]
    fields += [
        Field(Keys.Tokenizer.ADD_BOS, ids["bos"] in opening(tokenizer), GGUFValueType.BOOL),
        Field(Keys.Tokenizer.ADD_EOS, tokenizer("a").input_ids[-1] == ids["eos"], GGUFValueType.BOOL),
    ]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return [*fields, _string(Keys.Tokenizer.CHAT_TEMPLATE, template)] if template else fields


def _string(key: str, value: str) -> Field:
    return Field(key, value, GGUFValueType.STRING)


def _array(key: str, values: list[Any], inner: GGUFValueType) -> Field:
    return Field(key, values, GGUFValueType.ARRAY, inner)
