"""Where weights come from: ids of the hub and their files, and pickles, which are never read. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from duo.errors import UserError, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # suffixes; to read such a file is to run code that it may hold
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(source) is not None


def hub_file(source: str, name: str, *, kind: str) -> Path:
    """The file `name` of the hub model `source`, from the cache or, unless HF_HUB_OFFLINE is set, from the hub.

    Raises `UserError` where it cannot be had; `kind` is what was looked for: "a model".
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise UserError(
            f"{source!r} is neither a folder nor {kind} that the hub client can get ({first_line(error)}); "
            "give a local folder, or fetch it where there is a network"
        ) from error
