"""SIGKILLs at random moments over all stages (tests/support/kill.py says what must hold), as a table.

python tests/benchmarks/kills.py --kills 1000 --seed 0 --dir /dev/shm/kills
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.kill import killed
from support.stages import STAGES, Place

COLUMNS = ["stage", "kills", "finished", "went_on", "absent", "old", "whole", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="in all, shared evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, required=True, help="a new folder, which is left there")
    asked = parser.parse_args()
    asked.dir.mkdir()
    place = Place(asked.dir)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in STAGES:
        row = killed(place, name, asked.kills // len(STAGES), asked.seed)
        print("| " + " | ".join(str(row.get(column, 0)) for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
