"""How many directions a concept's words have in the embedded model's text encoder: `docs/results.md`, figure 4.

    python benchmarks/directions.py

The states of the end token of the pairs' unsafe prompts less those of the safe ones: the share of their squared length
along their first principal directions, and how far prompts reach along their mean. An edit of what prompts are turned
into (UCE) must catch these directions, of words that it was not told too.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from duo import load_concept
from duo.models import load_family
from duo.plugins import Family

SHOWN = 4


def ends(model: Family, prompts: tuple[str, ...]) -> Tensor:
    """The text encoder's states (n, width) at the end token of each prompt."""
    tokenizer = model.tokenizer()
    length = tokenizer.model_max_length
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    rows = ids.input_ids
    places = (rows == tokenizer.eos_token_id).int().argmax(dim=1)
    return model.encode_ids(rows)[torch.arange(len(rows)), places]


@torch.no_grad()
def main() -> None:
    model, concept = load_family("toybox"), load_concept("toybox-fire")
    differences = ends(model, concept.pairs.unsafe) - ends(model, concept.pairs.safe)
    energy = torch.linalg.svdvals(differences).square()
    along = torch.nn.functional.normalize(differences.mean(dim=0), dim=0)
    sets = {"unsafe": concept.pairs.unsafe, "safe": concept.pairs.safe}
    sets |= {name: concept.prompt_set(name) for name in ("held_out_words", "held_out_subjects", "neutral")}
    found = {
        "share of energy along the first directions": [round(float(e), 3) for e in (energy / energy.sum())[:SHOWN]],
        "mean place along the mean difference": {
            name: round(float((ends(model, prompts) @ along).mean()), 2) for name, prompts in sets.items()
        },
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
