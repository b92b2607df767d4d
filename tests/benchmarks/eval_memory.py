"""Peak memory of `flap eval` over 64 and 1,024 windows, alone and beside another load on all cores.

    python tests/benchmarks/eval_memory.py [--windows 64,1024] [--seqlen 128]

On the demo, streamed and not, in processes of their own; above what importing takes. What grows with the number of
windows, or with the load beside it, is memory that results or the heap's fragments hold on to. Half an
hour, with --seqlen 32 ten minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.timed_commands import MEASURED

LOAD = "import torch\nx = torch.randn(1500, 1500)\nwhile True: x @ x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", default="64,1024")
    parser.add_argument("--seqlen", type=int, default=128)
    asked = parser.parse_args()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    print("| way | windows | beside it | peak above imports (MB) | over the first |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for way in ("--no-stream", "--stream"):
            first = None
            for windows in (int(count) for count in asked.windows.split(",")):
                for load in (nothing, another_load):
                    with load():
                        found, peak = evaluate(Path(folder), text, windows, asked.seqlen, way)
                    first = first or peak
                    print(f"| {way} | {found} | {load.__doc__} | {peak / 1e6:.0f} | {peak / first:.2f} |", flush=True)


def evaluate(folder: Path, text: str, windows: int, seqlen: int, way: str) -> tuple[int, int]:
    """Windows that were read, and bytes at the peak."""
    from flapcli.checkpoints import open_checkpoint

    tokenizer = open_checkpoint("demo").load_tokenizer()
    ids = tokenizer(text).input_ids[: windows * seqlen + 1]
    (folder / "text.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    args = ["eval", "demo", "--out", folder / "eval.json", "--perplexity", folder / "text.txt", "--seqlen", seqlen]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, args), way, "--force"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "eval.json").read_text())
    [details] = report["perplexity_details"].values()
    return details["windows"], json.loads(done.stderr.splitlines()[-1])["bytes"]


@contextmanager
def nothing():
    """nothing"""
    yield


@contextmanager
def another_load():
    """another load"""
    other = subprocess.Popen([sys.executable, "-c", LOAD])
    try:
        yield
    finally:
        other.kill()
        other.wait()


if __name__ == "__main__":
    main()
