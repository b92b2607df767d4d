"""Kills real processes at random points: `flap` commands in forks of this process, so that a try costs no import.

    python -m support.kill FOLDER KILLS SEED [STAGE ...]     from tests/

Of each of STAGES the command is ended KILLS times by SIGKILL after a random share of the time that it takes
undisturbed, each try going on with whatever the one before left, from a folder without and with an older artifact.
After each kill every artifact must be absent, old or whole, and a run that ends must leave the very bytes of the
undisturbed one and nothing else. Prints what happened as a line of JSON for each stage.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from support.forks import wait
from support.stages import STAGES, Place, contents


def killed(place: Place, name: str, kills: int, seed: int) -> dict[str, Any]:
    """What happened to one stage, in numbers."""
    command, draw, bases = STAGES[name].command, random.Random(f"{name} {seed}"), place.bases(name)
    takes, expected = {}, {}
    for base in bases:
        place.restore(base)
        began = time.monotonic()
        place.do(command)
        takes[base], expected[base] = time.monotonic() - began, place.folder / f"{base}, done"
        shutil.rmtree(expected[base], ignore_errors=True)
        shutil.copytree(place.run, expected[base])
    place.log.write_text("")
    seen, tries, finished, base = Counter(), 0, 0, draw.choice(bases)
    place.restore(base)
    while True:
        child = place.begin(command)
        if tries < kills and draw.random() < 0.7:  # else it is let end, to be compared
            time.sleep(takes[base] * draw.uniform(0.02, 1))
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        assert code in (0, -signal.SIGKILL), place.log.read_text()[-3000:]
        if code:
            tries += 1
            seen.update(place.states(name, base, expected[base]))
            continue
        assert contents(place.run, card=True) == contents(expected[base], card=True), f"{name}: other bytes"
        finished, base = finished + 1, draw.choice(bases)
        if tries == kills:
            break
        place.restore(base)
    went_on = place.log.read_text().count("going on")
    return {"stage": name, "kills": kills, "finished": finished, "went_on": went_on, **seen,
            "seconds": round(max(takes.values()), 2)}  # fmt: skip


def main() -> None:
    folder, kills, seed, *names = sys.argv[1:]
    place = Place(Path(folder))
    for name in names or STAGES:
        print(json.dumps(killed(place, name, int(kills), int(seed))), flush=True)


if __name__ == "__main__":
    main()
