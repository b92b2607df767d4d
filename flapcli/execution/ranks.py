"""Several processes that share one calibration, healing or apply, started by torchrun or with the same environment.

Windows are spread over ranks, sums come back to rank 0 in rank order; solves are spread by layers, and lie in files.
Every rank shows the others that it lives by counting up in torch's store; one that stops for too long is named, so that
nobody waits for it.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from flapcli.errors import FlapError

BEAT, GRACE = 0.5, 3.0  # seconds between signs of life; without one for so long while things fail: dead
TRANSFER = 600.0  # seconds that one exchange may take once all ranks are at it
LOST = (RuntimeError, OSError)  # what torch raises where a peer or the store is gone
NEXT_STEP = "look at its own messages, and run the same again to go on from the last checkpoint"


class RankError(FlapError):
    """Another rank died, failed or never came."""


class Ranks:
    """This process among `size`; `rank` 0 writes. A context: raises RankError as soon as another rank is lost."""

    def __init__(self, rank: int, size: int, limit: float) -> None:
        self.rank, self.size, self.limit = rank, size, limit
        self._store: Any = None
        self._round = 0
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._next_check = 0.0
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    @classmethod
    def alone(cls) -> "Ranks":
        """The only process there is."""
        return cls(0, 1, 0)

    @classmethod
    def from_environment(cls, limit: float) -> "Ranks":
        """As torchrun says it in RANK and WORLD_SIZE; alone where it does not."""
        told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        missing = [name for name, value in told.items() if value is None]
        if missing and int(told["WORLD_SIZE"] or 1) > 1 and told["RANK"] is not None:
            raise RankError(f"WORLD_SIZE says {told['WORLD_SIZE']} processes, but {', '.join(missing)} is not set: "
                            "start them with torchrun, or unset RANK and WORLD_SIZE")  # fmt: skip
        if missing:
            return cls(0, 1, limit)
        return cls(int(told["RANK"] or 0), int(told["WORLD_SIZE"] or 1), limit)

    def share(self, count: int) -> slice:
        """Which of `count` windows are this rank's: even parts in rank order, the first ones larger by one."""
        even, rest = divmod(count, self.size)
        start = self.rank * even + min(self.rank, rest)
        return slice(start, start + even + (self.rank < rest))

    def __enter__(self) -> Self:
        if self.size > 1:
            self._join()
        return self

    def _join(self) -> None:
        absent = f"rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store = self._meeting_place()
            self._store = dist.PrefixStore("flap", store)
            self._store.set(f"host/{self.rank}", socket.gethostname())
            end = time.monotonic() + self.limit
            while missing := [rank for rank in range(self.size) if not self._store.check([f"host/{rank}"])]:
                if time.monotonic() > end:
                    absent = ", ".join(f"rank {rank}" for rank in missing)
                    raise TimeoutError
                time.sleep(0.01)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            transfer = timedelta(seconds=max(self.limit, TRANSFER))
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=transfer)
        except LOST as error:
            raise RankError(f"{self._me()}: {absent} did not come within {self.limit:.0f} s") from error
        self._beats.start()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminated)

    def _meeting_place(self) -> dist.Store:
        """The store at MASTER_ADDR: torchrun's agent holds it, else rank 0 does."""
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=self.limit)
        # Unlike init_method="env://" this does not wait for all to come, so that the absent can be named.
        store = dist.TCPStore(*place, self.size, is_master, limit, wait_for_workers=False, multi_tenant=True)
        # An agent that starts ranks again keeps what the ranks before them wrote.
        return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.size == 1:
            return
        with contextlib.suppress(*LOST):
            if error is None:
                self._leave()
            elif self._store is not None:
                self._tell(error)
        self._stop.set()
        if error is None:
            dist.destroy_process_group()

    def _leave(self) -> None:
        """End together; rank 0, which may hold the store, goes last."""
        self.agree(None)
        self._store.set(f"left/{self.rank}", b"1")
        end = time.monotonic() + 2 * GRACE
        while self.rank == 0 and time.monotonic() < end:
            if self._store.check([f"left/{rank}" for rank in range(self.size)]):
                return
            time.sleep(0.01)

    def _tell(self, error: BaseException) -> None:
        """Say to the others why this ends, unless another rank did; rank 0, which may hold the store, stays for it."""
        own = f"{self._names([self.rank])} failed: {str(error) or type(error).__name__}"
        if not self._store.check(["verdict"]):
            self._store.set("verdict", str(error) if isinstance(error, RankError) else own)
        time.sleep(GRACE if self.rank == 0 else 0)

    def agree(self, value: Any) -> list[Any]:
        """Every rank's value (JSON), in rank order; also a barrier."""
        if self.size == 1:
            return [value]
        self._round += 1
        keys = [f"agree/{self._round}/{rank}" for rank in range(self.size)]
        with self._naming_the_lost():
            self._store.set(keys[self.rank], json.dumps(value))
            while not self._store.check(keys):
                self.check()
                time.sleep(0.002)
            return [json.loads(self._store.get(key)) for key in keys]

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 every rank's tensor (all of one shape and dtype), in rank order; elsewhere none."""
        if self.size == 1:
            return [tensor]
        self.agree(None)  # waits for slower ranks by their signs of life, where torch would wait by the clock
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        self._wait(lambda: dist.gather(tensor, parts, dst=0, async_op=True))
        return parts or []

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """On rank 0 the sum over ranks, in place; elsewhere meaningless."""
        if self.size > 1:
            self._wait(lambda: dist.reduce(tensor, dst=0, async_op=True))
        return tensor

    def summed_on_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """On every rank the same sum over ranks, in place."""
        if self.size > 1:
            self._wait(lambda: dist.all_reduce(tensor, async_op=True))
        return tensor

    def _wait(self, start: Any) -> None:
        with self._naming_the_lost():
            work = start()
            while not work.is_completed():
                self.check()
                time.sleep(0.0005)
            work.wait()

    def check(self) -> None:
        """Raise RankError where another rank failed or has given no sign of life for the time limit."""
        if self.size == 1 or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + BEAT
        with self._naming_the_lost():
            if self._store.check(["verdict"]):
                raise RankError(self._store.get("verdict").decode())
            silent = self._silent(self.limit)
        if silent:
            raise RankError(f"{self._names(silent)} gave no sign of life for {self.limit:.0f} s: {NEXT_STEP}")

    def _silent(self, limit: float) -> list[int]:
        """Ranks whose count stood still for `limit` seconds of our watching."""
        now = time.monotonic()
        for rank in range(self.size):
            beat = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = (beat, now)
        return [rank for rank, (_, since) in self._seen.items() if now - since > limit and rank != self.rank]

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(*LOST):
            while not self._stop.wait(BEAT):
                count += 1
                self._store.set(f"beat/{self.rank}", str(count))

    def _terminated(self, _signal: int, _frame: FrameType | None) -> None:
        """torchrun ends all ranks when one dies: say which."""
        raise RankError(self._blame())

    @contextlib.contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Raise RankError in the place of what torch raises."""
        try:
            yield
        except LOST as error:
            raise RankError(self._blame()) from error

    def _blame(self) -> str:
        """What another rank found, else who is silent; watches for a few seconds to tell the dead from the living."""
        try:
            end = time.monotonic() + 2 * GRACE
            self._seen.clear()
            while time.monotonic() < end:
                if self._store.check(["verdict"]):
                    return self._store.get("verdict").decode()
                if silent := self._silent(GRACE):
                    return f"{self._names(silent)} died: {NEXT_STEP}"
                time.sleep(BEAT / 2)
        except LOST:
            return f"rank 0 of {self.size}, or the machine that brought the ranks together, died: {NEXT_STEP}"
        return f"{self._me()} was told to stop, or lost its connection: {NEXT_STEP}"

    def _names(self, ranks: list[int]) -> str:
        hosts = [self._store.get(f"host/{rank}").decode() for rank in ranks]
        return ", ".join(f"rank {rank} ({host})" for rank, host in zip(ranks, hosts, strict=True))

    def _me(self) -> str:
        return f"rank {self.rank} of {self.size}"


def refuse_unlike(ranks: Ranks, mine: dict[str, Any], hint: str) -> None:
    """Raise FlapError, which names what differs, where ranks are not at the same work; `hint` says what to do."""
    first, *others = ranks.agree(mine)
    for rank, theirs in enumerate(others, 1):
        if unlike := [name for name in first if theirs[name] != first[name]]:
            raise FlapError(
                f"rank {rank} and rank 0 do not work on the same, they differ in: {', '.join(unlike)}; {hint}"
            )
