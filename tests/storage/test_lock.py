"""One run at a time in a place: of a living process it is refused, of a dead one cleared, and readers go on."""

import json
import os
import signal
import threading
import time

import pytest

from flapcli.artifacts.run_dir import hold
from flapcli.errors import FlapError
from flapcli.storage import lock as storage_lock
from flapcli.storage.owner import Owner


@pytest.fixture(scope="module")
def run(prune, tiny, tmp_path_factory, flap, text_file):
    folder = prune(tiny("llama-gqa"), tmp_path_factory.mktemp("held") / "run")
    flap("eval", "-d", folder, "--perplexity", text_file, "--seqlen", 16, "--no-baseline")
    return folder


@pytest.fixture
def commands(run, tiny, text_file):
    text = ["--dataset", text_file, "--nsamples", "12", "--seqlen", "24", "--dtype", "float32"]
    return {
        "calibrate": ["calibrate", tiny("llama-gqa"), "-d", run, *text],
        "plan": ["plan", "-d", run, "--ratio", 0.3],
        "apply": ["apply", "-d", run],
        "eval": ["eval", "-d", run, "--perplexity", text_file, "--seqlen", 16, "--no-baseline"],
        "export": ["export", "gguf", "-d", run],
        "sweep": ["sweep", tiny("llama-gqa"), "-d", run, "--ratios", "0.3", *text],
        "run": ["run", tiny("llama-gqa"), "-d", run, *text],
    }


def elsewhere(text, **changes):
    """A lock's text as a process of another machine would have written it."""
    owner = Owner("0123456789ab", 7, "1")
    return json.dumps(json.loads(text) | {"owner": str(owner), "pid": 7, "host": "far"} | changes)


def in_a_child(run, then):
    """Fork a child that holds the run folder; `then` is called with its pid once it does."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with hold(run / "plan.yaml"):
            os.write(told, b"1")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        return then(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_every_stage_is_refused_where_another_run_is_at_work(run, flap, commands):
    def then(child):
        for name, arguments in commands.items():
            said = " ".join(flap(*arguments, code=1).stderr.split())
            assert "another run is at work in" in said, name
            assert f"process {child} on" in said and "or write elsewhere" in said
        flap("show", run)
        flap("report", "-d", run)
        flap(*commands["plan"], "--out", run.parent / "other.yaml")

    in_a_child(run, then)
    assert "up to date" in flap(*commands["plan"]).stderr  # it was killed, and the next run is not told of it
    assert not list(run.glob(".*"))


def test_the_same_thread_asks_again_and_another_does_not(tmp_path):
    said = []

    def other():
        try:
            with hold(tmp_path / "plan.yaml"):
                said.append("held")
        except FlapError as error:
            said.append(str(error))

    with hold(tmp_path / "run" / "stats.safetensors"), hold(tmp_path / "run" / "eval.json"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".flap.lock"]
        with hold(tmp_path / "run" / "mine.yaml"):  # a place of its own
            pass
    assert not (tmp_path / "run").exists()  # nothing came of it
    with hold(tmp_path / "stats.safetensors"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run is at work" in said[0]


def test_a_lock_from_elsewhere_holds_while_it_is_touched(tmp_path):
    lock = tmp_path / ".flap.lock"
    with hold(tmp_path / "plan.yaml"):
        text = lock.read_text()
    lock.write_text(elsewhere(text))
    with pytest.raises(FlapError, match=r"process 7 on far.*last sign of life was .* 90 s it counts as gone"):
        hold(tmp_path / "plan.yaml").__enter__()
    lock.write_text("")  # of a file system without links, not yet written
    with pytest.raises(FlapError, match="another run"):
        hold(tmp_path / "plan.yaml").__enter__()
    lock.write_text(elsewhere(text))
    leftovers = [tmp_path / f".{name}-{Owner('0123456789ab', 7, '1')}-00" for name in ("plan.yaml.tmp", "other.tmp")]
    for path in leftovers:
        path.touch()
    past = time.time() - 91
    os.utime(lock, (past, past))
    with hold(tmp_path / "plan.yaml"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert [path.exists() for path in leftovers] == [False, True]  # the run's own, and another's
    assert not lock.exists()


def test_it_is_touched_while_held_and_not_taken_from_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_lock, "BEAT", 0.02)
    lock = tmp_path / ".flap.lock"
    with hold(tmp_path / "plan.yaml"):
        text = lock.read_text()
        os.utime(lock, (1, 1))
        end = time.monotonic() + 20
        while lock.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 2
        lock.write_text(elsewhere(text))  # as another would that took this process for dead
    assert json.loads(lock.read_text())["host"] == "far"


def test_a_number_given_again_is_another_process(tmp_path):
    here = Owner.here()
    assert not here.has_ended
    assert Owner(here.machine, here.pid, "1").has_ended
    assert not Owner("elsewhere", here.pid, "1").has_ended
    child = os.fork()
    if not child:
        os._exit(0)
    ended = Owner(here.machine, child, "1")
    end = time.monotonic() + 20
    while not ended.has_ended and time.monotonic() < end:  # also before anybody waits for it
        time.sleep(0.01)
    assert ended.has_ended
    os.waitpid(child, 0)


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with hold(tmp_path / "plan.yaml"):
        said = json.loads((tmp_path / ".flap.lock").read_text())
        assert said["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_what_is_there_is_told(run, flap, commands, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage_lock, "_link", refuse)
    for stage in ("calibrate", "plan", "apply", "eval"):
        assert "up to date" in flap(*commands[stage]).stderr


def test_a_read_only_run_is_read_from_elsewhere(run, flap, commands, tmp_path):
    flap(*commands["apply"], "--out", tmp_path / "elsewhere" / "small")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["small"]
