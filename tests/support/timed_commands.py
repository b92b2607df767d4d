"""Commands of flap, each in a process of its own, with the time and memory that they take."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

MEASURED = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from flapcli.cli.app import app

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

imported = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began, used = time.monotonic(), time.process_time()
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
took, used = time.monotonic() - began, time.process_time() - used
found = {"seconds": took, "processor": used, "bytes": status("VmHWM") - imported, "imports": imported}
found["device"] = sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())))
print(json.dumps(found), file=sys.stderr)
"""


def flap(*arguments: object) -> dict[str, float]:
    """`seconds` and those of the `processor`, and bytes at the peak above those of the `imports`; exits where it fails.

    `device`: bytes that torch held of all GPUs at their peak. `whole`: seconds with start and imports.
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *(str(a) for a in arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stderr.strip().splitlines()[-1]) | {"whole": time.monotonic() - began}


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weight files' bytes to the same disk with fsync."""
    target.mkdir()
    began = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as read, (target / path.name).open("wb") as write:
            while block := read.read(1 << 24):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())
    return time.monotonic() - began
