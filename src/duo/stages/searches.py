"""Searches that saw no more than a text encoder, taken over wherever they would come out the same.

Within a run that is from the original model to the others. Between runs it is through a cache: one Ring-A-Bell search
serves every method that leaves the encoder alone. It lies in `$DUO_CACHE`, or `~/.cache/duo`; DUO_CACHE="" is none.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from duo import rundir
from duo.errors import UserError
from duo.plugins import Access, Family
from duo.rundir import Stage

STATE, SEARCH = "state.safetensors", "search"


def from_original(original: Stage, stage: Stage, encoder: str) -> bool:
    """Take over the original model's search where it cannot differ: it saw only the text encoder, which is the same.

    `Target` is what proves it: the attack had no access to the denoiser and asked for no image. Where the original was
    not attacked, there is nothing to take.
    """
    if not original.finished:
        return False
    manifest = original.require("attack")
    if "not_defined" in manifest or manifest["search_needs_denoiser"] or manifest["text_encoder"] != encoder:
        return False
    state = original.intact(STATE, original.sealed(STATE))
    for path in [state, *sorted((original.folder / SEARCH).glob("*.safetensors"))]:
        _copy(path, stage.folder / path.relative_to(original.folder))
    return True


def cached(attack: Any, config: Mapping[str, Any], encoder: str) -> Path | None:
    """Where a search of this attack is kept for all runs; None of one that depends on more than the text encoder.

    Its name is a digest of what it depends on: settings, prompts, seed and concept (`config`), the encoder, and the
    attack's own code.
    """
    asks = getattr(attack, "queries", 0) or getattr(attack, "learns_from_images", False)
    folder = os.environ.get("DUO_CACHE", str(Path.home() / ".cache" / "duo"))
    if attack.access != Access.TEXT or asks or getattr(attack, "uses_undefended", False) or not folder:
        return None
    code = hashlib.sha256(inspect.getsource(inspect.getmodule(type(attack)) or type(attack)).encode()).hexdigest()
    of = {
        name: value for name, value in config.items() if name not in ("erasure", "reference", "model", "attack_images")
    }
    return (
        Path(folder) / "searches" / rundir.digest({**of, "encoder": encoder, "code": code, "torch": version("torch")})
    )


def take(kept: Path | None, stage: Stage) -> bool:
    """Copy a search that is kept to a stage; false where there is none."""
    if kept is None or not kept.is_dir():
        return False
    for path in sorted(kept.rglob("*.safetensors")):
        _copy(path, stage.folder / path.relative_to(kept))
    return True


def keep(stage: Stage, kept: Path | None) -> None:
    """Keep a finished search for other runs. A cache that cannot be written is left alone, and told."""
    if kept is None or kept.exists():
        return
    making = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        for path in [stage.folder / STATE, *sorted((stage.folder / SEARCH).glob("*.safetensors"))]:
            _copy(path, making / path.relative_to(stage.folder))
        making.rename(kept)
    except (OSError, UserError) as error:
        rundir.note(f"searches are not kept for other runs: {error}; set DUO_CACHE to a folder, or to nothing")
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _copy(path: Path, to: Path) -> None:
    if not to.exists():
        rundir.write_bytes(to, path.read_bytes())


@torch.no_grad()
def encoder_digest(model: Family) -> str:
    """sha256 over the text encoder's table and its states of 32 random rows of ids."""
    table = model.token_embeddings()
    length = model.tokenizer().model_max_length
    ids = torch.randint(len(table), (32, length), generator=torch.Generator().manual_seed(0))
    total = hashlib.sha256()
    for tensor in (table, model.encode_ids(ids.to(model.device))):
        total.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
