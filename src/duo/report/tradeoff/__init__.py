"""From the cells of a bench to what they show together: figure 4, its numbers and its tables. No torch.

`cells` reads and checks them, `points` counts over prompts, `measures` has rates and intervals, `matched` compares
methods at equal preservation, `staircase` has fronts and areas, `analysis` puts all together, `figure` and `words` show
it.
"""

from duo.report.tradeoff.analysis import write_tradeoff

__all__ = ["write_tradeoff"]
