"""vLLM, in an environment of its own, as tests ask it: greedy tokens of folders, and its OpenAI server."""

import json
import os
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from support.servers import started

ROOT = Path(__file__).parents[2]
SMALL = {"kv_cache_memory_bytes": 1 << 27}  # 128 MiB are enough for any of the tests' models


def vllm_python() -> Path:
    """$FLAP_VLLM_PYTHON, or the environment that .ci/serving makes. FileNotFoundError, which says so, without."""
    python = Path(os.environ.get("FLAP_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.exists():
        raise FileNotFoundError(f"no vLLM: {python} is not there; .ci/serving makes it, or set FLAP_VLLM_PYTHON")
    return python


class Engine:
    """A process of vllm_child.py, which loads one folder at a time; `log` takes what vLLM prints.

    `plugins` are those that it loads, by default none.
    """

    def __init__(self, log: Path, plugins: str = "") -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [vllm_python(), "-P", Path(__file__).with_name("vllm_child.py")], env=_environment(plugins),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip
        self.version = self._answer()["version"]

    def ask(self, folder: Path, prompts: list[list[int]], count: int, **settings: Any) -> dict[str, Any]:
        """Of vllm_child.py's `answer`."""
        request = {"folder": str(folder), "prompts": prompts, "count": count} | SMALL | settings
        pipe(self.process.stdin).write(json.dumps(request) + "\n")
        pipe(self.process.stdin).flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = pipe(self.process.stdout).readline()
        assert line, f"vLLM ended: {self.log.read_text()[-3000:]}"
        return json.loads(line)

    def close(self) -> None:
        pipe(self.process.stdin).close()
        self.process.wait(60)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream
    return stream


def _environment(plugins: str = "") -> dict[str, str]:
    """Without the path that makes flap importable: what vLLM loads must stand alone."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": plugins,
    }


def openai_server(folder: Path, log: Path) -> AbstractContextManager[str]:
    """The address of vLLM's OpenAI server on a folder, with the options that users are told (README)."""
    options = ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
    return started([*command, "--served-model-name", "pruned"], log, _environment())
