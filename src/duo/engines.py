"""What does a grid's units: this process, or Ray on this machine or a cluster. The cells come out the same.

Both give every unit as many threads as the bench says, so that on the CPU, with the same versions, cells are equal byte
for byte. Ray's workers must see the folders of the run and the results: on a cluster that is a shared disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from duo.errors import UserError

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
    """Units as tasks of Ray, each as soon as those that it needs are done, on `gpus` GPUs and `unit.threads` CPUs each.

    `address` is that of a cluster that runs ("auto" finds it); without one a local one of `workers` × threads CPUs is
    started (all that there are where None), and stopped at the end. Raises `UserError` where Ray is not there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    # A worker that dies for want of memory is started again; one whose driver was killed must not go on for long.
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray: Ray is not installed; pip install 'duo-unlearning[ray]'") from error
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
    # The names of what a unit needs are handed over too: Ray waits for them, and where one failed so do its followers.
    task = ray.remote(lambda unit, *_before: work(unit))
    made: dict[str, Any] = {}
    for unit in units:
        before = [made[name] for name in unit.needs if name in made]
        made[unit.name] = task.options(num_cpus=unit.threads, num_gpus=gpus, name=unit.name).remote(unit, *before)
    left = {reference: unit for unit, reference in zip(units, made.values(), strict=True)}
    while left:
        done, _ = ray.wait(list(left), num_returns=1)
        for reference in done:
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            told(left.pop(reference))


def _cause(error: Any) -> BaseException:
    """What went wrong in a task, through those that waited for it."""
    cause = error
    while hasattr(cause, "cause") and isinstance(cause.cause, BaseException):
        cause = cause.cause
    return cause if isinstance(cause, BaseException) else RuntimeError(str(error))
