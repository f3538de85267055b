"""An experiment: DUO with the frozen model's outputs cached over a fixed bank of draws, and what that does to quality.

    python benchmarks/noise_bank.py --out runs/noise-bank --docs docs/results

A step of DUO draws pairs, times and noise, and asks the frozen model for them: of a bank of N batches it asks once for
each, and later steps read the answer. Noise repeats then, which changes the training distribution; so each bank's
erasure is attacked by plain prompts and held-out subjects and scored, beside training as it is shipped (bank 0). It is
not shipped: docs/performance.md says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import machine, one
from torch import Tensor

from duo import load_recipe
from duo.methods.duo import Duo
from duo.rundir import read_jsonl, write_json

RECIPE, ROWS = "toybox-fire-published", ("prompts", "prompts_held_out_subjects")
SHIPPED = Duo._objective


class Remembering:
    """A family, and in turn the LoRA in its denoiser, that asks the frozen model once for each batch of the bank."""

    def __init__(self, model: Any, lora: Any) -> None:
        self._model, self._lora, self._frozen = model, lora, False
        self._known: dict[int, Tensor] = {}
        self.batch = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._lora.disabled():
            self._frozen = True
            yield
        self._frozen = False

    def predict(self, *given: Any) -> Tensor:
        if not self._frozen:
            return self._model.predict(*given)  # type: ignore[no-any-return]
        if self.batch not in self._known:
            self._known[self.batch] = self._model.predict(*given)
        return self._known[self.batch]


def banked(size: int) -> Callable[..., Any]:
    """DUO's objective over a bank of so many batches; a batch is its number's draws."""

    def objective(self: Duo, model: Any, lora: Any, **given: Any) -> Any:
        remembering = Remembering(model, lora)
        loss = SHIPPED(self, remembering, remembering, **given)  # type: ignore[arg-type]

        def of_the_bank(generator: torch.Generator) -> Any:
            remembering.batch = int(torch.randint(size, (), generator=generator))
            return loss(torch.Generator().manual_seed(remembering.batch))

        return of_the_bank

    return objective


def told(report: dict[str, Any], out: Path) -> dict[str, Any]:
    """What is compared of one erasure."""
    rows = {row["name"]: row for row in report["attacks"] if row["model"] == "erased"}
    seconds = sum(row["seconds"] for row in read_jsonl(out / "timings.jsonl", appended=True) if row["stage"] == "erase")
    return {
        "erase_seconds": seconds,
        "detected": {name: rows[name]["rate"] for name in ROWS},
        "spoiled": {name: rows[name]["corrupted_rate"] for name in ROWS},
        "preservation": report["preservation"]["mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/noise-bank"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--banks", type=int, nargs="+", default=(0, 32, 8), help="batches; 0: as shipped")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    given = parser.parse_args()
    base = load_recipe(RECIPE)
    rows = tuple(row for row in base.attacks if row.row in ROWS)
    base = replace(base, attacks=rows, score=replace(base.score.without_besides(), near_miss=1))
    found: dict[str, dict[str, Any]] = {}
    first = None
    for seed in given.seeds:
        for bank in given.banks:
            out = given.out / f"bank-{bank}-seed-{seed}"
            with mock.patch.object(Duo, "_objective", banked(bank) if bank else SHIPPED):
                report = one(replace(base, erase_seed=seed), out, first, same_pairs=True)
            first = first or out
            found.setdefault(str(bank), {})[str(seed)] = told(report, out)
            print(bank, seed, found[str(bank)][str(seed)], flush=True)
            write_json(given.docs / "noise-bank.json", {"recipe": RECIPE, "banks": found, **machine()})


if __name__ == "__main__":
    main()
