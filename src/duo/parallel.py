"""Several processes at one run, as `accelerate launch -m duo …` or torchrun start them. No torch where there is one.

Every process runs the same program on the same run folder. What is cut into blocks is shared out by `mine`, block by
block to whoever is free; what must be done once is done `once`, by the main process; `barrier` waits for all. Results
do not depend on who computed what, because a block is always computed whole and from seeds of its own.

All waiting goes through the key-value store that torch.distributed meets at, not through collectives: those give up
after minutes, and a stage may well leave one process waiting for hours. `stop` is seen by all who wait or come for a
block, so that one process's error ends the others too, and is told once. Only `add_up`, of gradients, and the frozen
weights that `duo.precision.sharded` gathers go by collectives.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from duo.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LONGEST_NAP = 0.1  # seconds between two looks at the store
STOPPED = "stopped"


class StoppedError(UserError):
    """Another process stopped, and told why."""


# What torchrun and accelerate's launcher tell each process.
def size() -> int:
    """How many processes are at work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes manifests and joins what the others made."""
    return rank() == 0


def go_alone() -> None:
    """From here on this process works as if it were the only one, at what cannot be shared."""
    os.environ["WORLD_SIZE"] = "1"


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this process works as if it were the only one, at what the others do not do beside it."""
    before = os.environ.get("WORLD_SIZE")
    go_alone()
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def start(device: str) -> str:
    """Join the other processes, and return this one's device: "cuda" is the GPU of its number on its machine."""
    if size() == 1:
        return device
    from accelerate import PartialState

    on_cpu = device == "cpu"
    try:
        state = PartialState(cpu=on_cpu, **({"backend": "gloo"} if on_cpu else {}))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size()} processes cannot join ({first_line(error)}); launch them again") from error
    return str(state.device) if device == "cuda" else device


def mine(items: Sequence[T]) -> Iterator[T]:
    """Those of `items`, the same for every process, that fall to this one: each to whoever comes for it first."""
    if size() == 1:
        yield from items
        return
    counter = _meeting().next_key("mine")
    while True:
        _meeting().check()
        taken = _meeting().count(counter, 1) - 1
        if taken >= len(items):
            return
        yield items[taken]


def barrier() -> None:
    """Wait for all processes; raise `StoppedError` where one of them stopped."""
    if size() > 1:
        key = _meeting().next_key("barrier")
        _meeting().gather(key)
        if is_main():  # which may keep the store, and so must not end while others still look
            _meeting().wait(lambda: _meeting().count(f"{key}/left") == size() - 1)
        else:
            _meeting().count(f"{key}/left", 1)


def once(act: Callable[[], T]) -> T:
    """What `act` returns (a JSON value) in the main process, which alone calls it; the others wait for it."""
    if size() == 1:
        return act()
    key = _meeting().next_key("once")
    if is_main():
        try:
            result = act()
        except BaseException:
            stop()
            raise
        _meeting().store.set(key, json.dumps(result))
    else:
        _meeting().wait(lambda: _meeting().store.check([key]))
        result = json.loads(_meeting().store.get(key))
    barrier()  # the main process may end next, and the store with it
    return result


def stop() -> bool:
    """Tell all processes to stop; whether this one was the first to, and so is the one that says why."""
    if size() == 1:
        return True
    own = str(rank())
    try:
        return str(_meeting().store.compare_set(STOPPED, "", own).decode()) == own
    except (RuntimeError, UserError):  # who kept the store has stopped already
        return is_main()


def share(rows: int) -> slice:
    """This process's part of a batch of `rows`, which must have one for each."""
    if rows < size():
        raise UserError(
            f"train_batch_size = {rows} for {size()} processes; give each at least one pair, or start fewer"
        )
    return slice(rows * rank() // size(), rows * (rank() + 1) // size())


@contextmanager
def exchanging() -> Iterator[None]:
    """Within the context collectives may run: one that breaks because another process stopped is a `StoppedError`."""
    try:
        yield
    except RuntimeError:
        _meeting().check()  # a connection that broke because the other process stopped is no news
        raise


def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes into each of `tensors`, by one exchange in float32."""
    if size() == 1:
        return
    import torch

    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    with exchanging():
        torch.distributed.all_reduce(flat)
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


@dataclass
class _Meeting:
    """The store, and how often each kind of meeting was held: every process counts alike, so their keys agree."""

    store: Any
    held: dict[str, int] = field(default_factory=dict)

    def next_key(self, kind: str) -> str:
        self.held[kind] = self.held.get(kind, 0) + 1
        return f"{kind}/{self.held[kind]}"

    def check(self) -> None:
        """Raise `StoppedError` where another process stopped."""
        try:
            stopped = self.store.check([STOPPED])
        except RuntimeError as error:  # the process that kept the store is gone
            raise StoppedError("the main process stopped") from error
        if stopped:
            raise StoppedError("another process stopped")

    def count(self, key: str, more: int = 0) -> int:
        try:
            return int(self.store.add(key, more))
        except RuntimeError:
            self.check()
            raise

    def gather(self, key: str) -> None:
        self.count(key, 1)
        self.wait(lambda: self.count(key) == size())

    def wait(self, reached: Callable[[], bool]) -> None:
        nap = 0.001
        while not reached():
            self.check()
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)


@cache
def _meeting() -> _Meeting:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {size()} processes cannot meet ({first_line(error)}); launch them again") from error
    return _Meeting(PrefixStore("duo", store))
