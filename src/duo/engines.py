"""What does a grid's units: this process, or Ray on this machine or a cluster. The cells come out the same.

Both give every unit as many threads as the bench says, so that on the CPU, with the same versions, cells are equal byte
for byte. Ray's workers must see the folders of the run and the results: on a cluster that is a shared disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from duo.errors import UserError, first_line

ENGINES = ("here", "ray")


def here(units: Sequence[Any], work: Callable[[Any], None], told: Callable[[Any], None]) -> None:
    """One unit after the other, in this process; `told` is called with each that is done."""
    for unit in units:
        work(unit)
        told(unit)


def on_ray(
    units: Sequence[Any],
    work: Callable[[Any], None],
    told: Callable[[Any], None],
    *,
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
) -> None:
    """Units as tasks of Ray, each once those that it needs are done, on `unit.threads` CPUs and `gpus` GPUs each.

    `address` is that of a cluster that runs ("auto" finds it); without one a local one of `workers` × threads CPUs is
    started (all that there are where None), and stopped at the end. Raises `UserError` where Ray is not there, or loses
    a worker.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: Ray is not installed; pip install -e '.[ray]' in the clone of duo") from error
    threads = max((unit.threads for unit in units), default=1)
    local = {} if workers is None else {"num_cpus": workers * threads}
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False,
            log_to_driver=True,
            logging_level="ERROR",
            **({} if address else local),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--engine ray: {' '.join(str(error).split())}") from error
    try:
        _all(ray, units, work, told, gpus=gpus)
    finally:
        ray.shutdown()


def _all(ray: Any, units: Sequence[Any], work: Any, told: Callable[[Any], None], *, gpus: float) -> None:
    """Hand out units in their order, each once what it needs is done, and no more at once than there is room for.

    Ray itself would start whatever waits for nothing: every erasure before the first attack.
    """
    task = ray.remote(lambda unit: work(unit))
    room, left = _room(ray, units, gpus), list(units)
    missing = {unit.name for unit in units}
    running: dict[Any, Any] = {}
    while left or running:
        for unit in [one for one in left if not missing.intersection(one.needs)][: room - len(running)]:
            left.remove(unit)
            running[task.options(num_cpus=unit.threads, num_gpus=gpus, name=unit.name).remote(unit)] = unit
        for reference in ray.wait(list(running), num_returns=1)[0]:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # Ray's own: a worker that died, no memory, an object that is lost
                raise UserError(
                    f"--engine ray: {running[reference].name} was not done: {first_line(error).rstrip('.')}; finished "
                    "cells are kept, and the same command goes on (with fewer --workers where memory is short)"
                ) from error
            unit = running.pop(reference)
            missing.discard(unit.name)
            told(unit)


def _room(ray: Any, units: Sequence[Any], gpus: float) -> int:
    """How many units the cluster can hold at once; a `UserError` where that is none."""
    has, threads = ray.cluster_resources(), max((unit.threads for unit in units), default=1)
    room = int(has.get("CPU", 0) // threads)
    if gpus:
        room = min(room, int(has.get("GPU", 0) / gpus))
    if room < 1:
        raise UserError(
            f"--engine ray: a cell takes {threads} CPUs and {gpus:g} GPUs, and there are {has.get('CPU', 0):g} and "
            f"{has.get('GPU', 0):g}; lower threads in the bench or --gpus, or add machines"
        )
    return room
