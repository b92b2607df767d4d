"""What a new user sees of a command: time to the first line, the longest silence, all screens' lines and the last one.

Runs `flap ARGS` (default: `run`) in a pseudo-terminal of 80 columns and 24 lines, as a person's shell would.

    python tests/benchmarks/first_hour.py run -d /tmp/first
"""

import os
import pty
import re
import select
import struct
import sys
import time
from fcntl import ioctl
from termios import TIOCSWINSZ

COLUMNS, LINES = 80, 24
CODES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")


class Screen:
    """As much of a terminal as rich asks for: lines that are written over, cleared and scrolled."""

    def __init__(self) -> None:
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text: str) -> None:
        for code in CODES.findall(text):
            if code == "\r":
                self.column = 0
            elif code == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif code[0] != "\x1b":
                self._write(code)
            elif code[-1] == "A":
                self.row = max(0, self.row - int(code[2:-1] or 1))
            elif code[-1] == "K":
                self.lines[self.row] = ""

    def _write(self, text: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + text + line[self.column + len(text) :]
        self.column += len(text)


def watch(arguments: list[str]) -> tuple[list[tuple[float, bytes]], int, float]:
    """What came when, the exit code and the seconds that a command took."""
    begun = time.monotonic()
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        os.execv(sys.executable, [sys.executable, "-m", "flapcli", *arguments])
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    came = []
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the child is gone
            break
        if not data:
            break
        came.append((time.monotonic() - begun, data))
    return came, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - begun


def visible(data: bytes) -> bool:
    return bool(CODES.sub(lambda m: "" if m[0][0] in "\x1b\r\n" else m[0], data.decode(errors="replace")).strip())


def main() -> None:
    arguments = sys.argv[1:] or ["run"]
    came, code, took = watch(arguments)
    seen = [at for at, data in came if visible(data)]
    gaps = [(later - earlier, earlier) for earlier, later in zip([0.0, *seen], [*seen, took], strict=True)]
    longest, after = max(gaps)
    screen = Screen()
    screen.feed(b"".join(data for _, data in came).decode(errors="replace"))  # whole: a letter may come in two parts
    lines = [line.rstrip() for line in screen.lines]
    print(f"$ flap {' '.join(arguments)}    ({COLUMNS} x {LINES}, exit {code}, {took:.1f} s)")
    print(f"first line after {seen[0]:.2f} s, longest silence {longest:.2f} s (after {after:.1f} s)\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
