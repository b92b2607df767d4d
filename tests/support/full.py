"""Runs `flap` commands on a disk that is too small for them, in forks of this process.

    python -m support.full FOLDER POINTS [STAGE ...]     from tests/

Each of STAGES first runs on a tmpfs with room, which tells how much it takes at its most; then POINTS times with a
share of that from nothing to nearly all, from a folder without and with an older artifact by turns. It must end with
exit code 1 and one line that names the disk; each artifact must be absent, old or whole, and nothing half-done be left
but what calibrate and a sequential fit go on with. Then, with room again, it must end with the very bytes of the first
run. Prints what happened as a line of JSON for each stage. Root alone may mount; FOLDER/disk is unmounted at the end.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from support.forks import wait
from support.stages import STAGES, Place, contents

ROOM = 2**28
SAID = ("no space left while writing", "not enough disk space at")


class Disk:
    """A tmpfs at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("size=" + str(ROOM), "tmpfs", path)

    def resize(self, size: int) -> None:
        self._mount(f"remount,size={size}", self.path)

    @property
    def used(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def _mount(self, options: str, *what: str | Path) -> None:
        kind = ["-t", "tmpfs"] if len(what) > 1 else []
        subprocess.run(["mount", *kind, "-o", options, *what], check=True, capture_output=True)


def most(place: Place, disk: Disk, command: str) -> int:
    """Bytes that the command takes on the disk at its most, beyond what lay there."""
    before = found = disk.used
    child = place.begin(command)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        found = max(found, disk.used)
        time.sleep(0.0005)
    assert wait(child) == 0, place.log.read_text()[-3000:]
    return found - before


def filled(place: Place, disk: Disk, name: str, points: int) -> dict[str, Any]:
    """What happened to one stage, in numbers."""
    command, bases, seen = STAGES[name].command, place.bases(name), Counter()
    takes, expected = {}, {}
    for base in bases:
        place.restore(base)
        takes[base], expected[base] = most(place, disk, command), place.folder / f"{base}, done"
        shutil.rmtree(expected[base], ignore_errors=True)
        shutil.copytree(place.run, expected[base])
    for point in range(points):
        base = bases[point % 2]
        place.restore(base)
        place.log.write_text("")
        disk.resize(max(disk.used + int(takes[base] * point / points), 4096))
        code, said = wait(place.begin(command)), place.log.read_text()
        disk.resize(ROOM)
        seen.update(place.states(name, base, expected[base]), code=code)
        check(name, code, said, place)
        place.do(command)
        assert contents(place.run, card=True) == contents(expected[base], card=True), f"{name}: other bytes"
    return {"stage": name, "points": points, "bytes": max(takes.values()), "exit 1": seen.pop("code"), **seen}


def check(name: str, code: int, said: str, place: Place) -> None:
    """AssertionError unless the command ended as it must."""
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert "Traceback" not in said and "unexpected" not in said, f"{name}: {said}"
    if code:
        assert code == 1 and len(lines) == 1, f"{name}: {said}"
        assert any(words in lines[0] for words in SAID) and str(place.run.parent) in lines[0], f"{name}: {said}"
    hidden = [path.name for path in place.run.rglob(".*") if not path.name.endswith(".resume")]
    assert hidden == [], f"{name} leaves {hidden}: {said}"


def main() -> None:
    folder, points, *names = sys.argv[1:]
    disk = Disk(Path(folder) / "disk")
    try:
        place = Place(Path(folder), "disk/run")
        for name in names or STAGES:
            print(json.dumps(filled(place, disk, name, int(points))), flush=True)
    finally:
        subprocess.run(["umount", disk.path], check=False)


if __name__ == "__main__":
    main()
