"""Tokenizers of the kinds that real checkpoints have, trained here on real text, since none can be downloaded."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import flapcli.export

VOCABULARY = 900
BOS = 1  # of the tiny models' tokenizer, whose <pad> is 0 and </s> 2
PRE = {
    row["pre"]: row
    for row in json.loads((Path(flapcli.export.__file__).parent / "pretokenizers.json").read_text(encoding="utf-8"))
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(pre: str, text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the pre-tokenizer that llama.cpp calls `pre`, and ChatML."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE[pre].get("ignore_merges", False)))
    spec = json.loads(tokenizer.to_str())
    steps = [step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {}) for step in PRE[pre]["steps"]]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


def sentencepiece_like(text: str) -> LlamaTokenizer:
    """Llama-2's kind: sentencepiece BPE with byte fallback, digits apart, in transformers' form of it."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        corpus, prefix = Path(folder) / "text.txt", Path(folder) / "tokenizer"
        corpus.write_text(text)
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(prefix), vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
            character_coverage=0.9999, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2,
        )  # fmt: skip
        trained = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = {trained.id_to_piece(i): i for i in range(len(trained))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda p: -trained.get_score(pieces[p]))
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces and not piece.startswith("<0x")
    ]
    return LlamaTokenizer(vocab=pieces, merges=merges)


def gemma_like(tokenizer: LlamaTokenizer) -> None:
    """Make Llama-2's kind Gemma's: no space before a text, and a split at spaces that are all replaced by then."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")


def opening_with(template: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around every text, such as `<s> $A`, as Llama's and Gemma's have."""
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in template.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=specials
    )
    return tokenizer
