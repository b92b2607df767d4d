"""Which process something on disk belongs to, and whether that has ended: for locks and for scratch names."""

import hashlib
import os
import platform
import uuid
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self


class Owner(NamedTuple):
    """A process, told from all others, also from one that was given its number later.

    `machine` is a host since its boot, and in it a namespace of process numbers, which containers have of their own.
    """

    machine: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(_machine(), os.getpid(), _started(os.getpid()) or "0")

    @classmethod
    def read(cls, text: str) -> Self | None:
        """What `str` made of one; None for other text."""
        machine, _, rest = text.partition("-")
        pid, _, started = rest.partition("-")
        return cls(machine, int(pid), started) if machine and pid.isdecimal() and started.isdecimal() else None

    def __str__(self) -> str:
        return f"{self.machine}-{self.pid}-{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether this process can tell if that one lives."""
        return self.machine == _machine()

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended; of a process elsewhere nothing is known."""
        if not self.is_here or os.name == "nt":  # where os.kill kills
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's process
        started = _started(self.pid)
        return started is not None and started != self.started


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        parts = [platform.node(), boot, str(os.stat("/proc/self/ns/pid").st_ino)]
    except OSError:  # no Linux
        parts = [platform.node(), str(uuid.getnode())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot; empty for one that has ended and was not waited for.

    None where that can't be read.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        return None
