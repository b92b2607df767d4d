"""Commands of flap by torchrun, in several processes of this machine."""

import os
import socket
import subprocess
import sys

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(*arguments: object, script: tuple[object, ...] = ("-m", "flapcli"), **environment: str):
    """`flap ARGUMENTS`, or what a script makes of them, in two processes; as `subprocess.run` returns it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return subprocess.run(
        [*command, *map(str, (*script, *arguments))], env=os.environ | ENVIRONMENT | environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
