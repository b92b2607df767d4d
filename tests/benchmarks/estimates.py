"""`flap estimate` for models of Llama 3's sizes, which need not be there: the table of the README.

    python tests/benchmarks/estimates.py [OPTIONS OF flap estimate]

Headers without weights are written into a temporary folder. Of a machine that it names, whichever it runs on.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from memory import TINYLLAMA, specs

from flapcli.checkpoints.hub_headers import hollow
from flapcli.cli.app import app
from flapcli.estimation import machine

FREE, MULTIPLIES, WRITES = 24 * 10**9, 5e10, 1e8  # bytes of memory; multiply-adds and bytes a second

LLAMA_3 = TINYLLAMA | {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES = {
    "1B": (2048, 8192, 16, 32, 64), "3B": (3072, 8192, 28, 24, 128), "8B": (4096, 14336, 32, 32, 128),
    "70B": (8192, 28672, 80, 64, 128),
}  # fmt: skip


def headers(folder: Path, name: str) -> None:
    """A folder of this size's configuration and of one hollow file."""
    folder.mkdir()
    tied = name in ("1B", "3B")
    config = LLAMA_3 | dict(zip(KEYS, SIZES[name], strict=True)) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for spec in specs(config):
        if not (tied and spec.name == "lm_head.weight"):
            offsets = [end, end := end + spec.nbytes]
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    hollow(folder / "model.safetensors", header)


def main() -> None:
    machine.free_memory = lambda _device: FREE
    machine._writes = lambda _folder: WRITES
    machine.Machine.multiplies = lambda *_: MULTIPLIES
    with tempfile.TemporaryDirectory() as scratch:
        for name in SIZES:
            headers(Path(scratch) / name, name)
            app(["estimate", str(Path(scratch) / name), *sys.argv[1:]], standalone_mode=False)


if __name__ == "__main__":
    main()
