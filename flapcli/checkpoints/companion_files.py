"""What lies beside a checkpoint's weights and goes with them, by what the folder holds."""

from fnmatch import fnmatch
from pathlib import Path

LARGEST = 64 * 2**20  # bytes; the largest tokenizers have half as many, and what is larger is data
# Weights in any form, and what trainers leave.
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
    ".npy", ".tflite", ".pkl", ".ot", ".nemo", ".task", ".mlmodel", ".index.json",
)  # fmt: skip
# Made anew for a pruned folder, or a state of training.
LEFT = ("config.json", "readme*", "plan.yaml", "modeling_flap.py", "trainer_state.json", "events.*", "consolidated*")
TOKENS = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.spm", "*.bpe", "*.vocab")  # decide token ids
TEMPLATES = ("*.jinja", "chat_template.json")


def companion_files(folder: Path) -> dict[str, Path]:
    """Files by name relative to the folder: tokenizer, its code, chat templates, generation settings, licences.

    All that is small but weights, training states and hidden files; of subfolders, which hold other forms of the
    model, chat templates alone.
    """
    below = (path for path in folder.glob("*/*.jinja") if not path.parent.name.startswith("."))
    files = [path for path in (*folder.iterdir(), *below) if path.is_file() and _belongs(path)]
    return {path.relative_to(folder).as_posix(): path for path in sorted(files)}


def _belongs(path: Path) -> bool:
    name = path.name.lower()
    left = name.startswith(".") or any(fnmatch(name, pattern) for pattern in LEFT)
    return not left and not name.endswith(WEIGHTS) and path.stat().st_size <= LARGEST


def decides_tokens(name: str, chats: bool) -> bool:
    """Whether a companion decides the token ids of a text, `chats` being one that chat templates lay out."""
    patterns = TOKENS + TEMPLATES if chats else TOKENS
    return any(fnmatch(Path(name).name.lower(), pattern) for pattern in patterns)
