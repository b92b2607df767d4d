"""Disks that are too small, over all stages (tests/support/full.py says what must hold), as a table.

python tests/benchmarks/full_disk.py --points 200 --dir /dev/shm/full_disk
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.full import Disk, filled
from support.stages import STAGES, Place

COLUMNS = ["stage", "points", "bytes", "exit 1", "absent", "old", "whole", "unfinished"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=200, help="in all, shared evenly")
    parser.add_argument("--dir", type=Path, required=True, help="a new folder, which is left there")
    asked = parser.parse_args()
    asked.dir.mkdir()
    disk = Disk(asked.dir / "disk")
    try:
        place = Place(asked.dir, "disk/run")
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for name in STAGES:
            row = filled(place, disk, name, asked.points // len(STAGES))
            print("| " + " | ".join(str(row.get(column, 0)) for column in COLUMNS) + " |", flush=True)
    finally:
        subprocess.run(["umount", disk.path], check=False)


if __name__ == "__main__":
    main()
