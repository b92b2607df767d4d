"""A stock llama.cpp, from the wheel xllamacpp, as tests ask it: next tokens, tokenisation, chat."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import xllamacpp


class LlamaCpp:
    """A GGUF loaded by llama.cpp's server in this process. `vocabulary` is its number of tokens."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 256
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # In float32 all the way, so that what differs from torch is the file and not the cache.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def next_logprobs(self, ids: list[int]) -> np.ndarray:
        """Log probabilities of every next token after `ids`, (vocabulary,)."""
        found = self._next(ids, self.tokenize("a")[-1], self.vocabulary)["top_logprobs"]
        values = np.full(self.vocabulary, -np.inf)
        values[[entry["id"] for entry in found]] = [entry["logprob"] for entry in found]
        return values

    def read(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """For each token but the first: its log probability, and the token that llama.cpp would have taken."""
        logprobs, choices = [], []
        for i in range(1, len(ids)):
            found = self._next(ids[:i], ids[i], 1)
            logprobs.append(found["logprob"])
            choices.append(found["top_logprobs"][0]["id"])
        return np.array(logprobs), np.array(choices)

    def _next(self, ids: list[int], forced: int, count: int) -> dict:
        """What llama.cpp says of the token after `ids`, which a bias makes `forced`, and of the `count` likeliest.

        Probabilities are reported as they are without the bias. A token that ends the text or is half a
        character would be held back without them, hence the forcing.
        """
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": count, "logit_bias": [[forced, 1000.0]]}
        found = self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]
        assert found["id"] == forced
        return found

    def tokenize(self, text: str) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": True})["tokens"]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        return self._post("/apply-template", {"messages": messages})["prompt"]

    def complete(self, text: str, count: int) -> str:
        asked = {"prompt": text, "n_predict": count, "temperature": 0}
        return self.server.handle_completions(asked)["choices"][0]["text"]

    def chat(self, messages: list[dict[str, str]], count: int) -> str:
        asked = {"messages": messages, "max_tokens": count, "temperature": 0}
        return self.server.handle_chat_completions(asked)["choices"][0]["message"]["content"]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
