"""The embedded default: a drawn world, small diffusion models trained on it, and their judges."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def world_digest() -> str:
    """SHA-256 over everything that a toybox score depends on besides the model: the world, its language and splits, the
    concept files, and the judges' weights. Every result names it; where it changes, published numbers are made again.
    """
    from duo.toybox import concept_files, language, world

    tables = {
        "renderer": world.RENDERER_VERSION,
        "subjects": world.SUBJECTS,
        "colours": world.COLOURS,
        "places": world.PLACES,
        "rates": world.NATURAL_RATES,
        "routes": language.ROUTES,
        "intact": language.INTACT,
        "place words": language.PLACE_WORDS,
        "extra words": language.EXTRA_WORDS,
        "frames": language.FRAMES,
    }
    digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode())
    files = [concept_files.FOLDER / f"toybox-{hazard}.toml" for hazard in world.HAZARDS]
    for path in [*files, *sorted((WEIGHTS / "judges").glob("*.safetensors"))]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
