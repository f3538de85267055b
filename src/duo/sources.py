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


def hub_file(source: str, name: str, *, kind: str, give: str) -> Path:
    """The file `name` of the hub model `source`: from the hub, or from the cache where HF_HUB_OFFLINE is set or no
    network answers.

    Raises `UserError` where it cannot be had: `kind` is what was looked for ("a model"), and `give` is what the user
    may give in its place. Where the file is not in the cache, the hub client alone would try a network that does not
    answer six more times, over half a minute; here the hub is asked once, beforehand.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(source, name), str):
            _ask(source, name)
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise UserError(
            f"{source!r} is neither a folder nor {kind} that the hub client can get ({first_line(error)}); "
            f"give {give}, or run `hf download {source}` where there is a network, and set HF_HUB_OFFLINE=1"
        ) from error


def _ask(source: str, name: str) -> None:
    """Raise an `OSError` or `ValueError` where the hub does not answer, or has no such file for us."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.is_offline_mode():
        raise FileNotFoundError(f"HF_HUB_OFFLINE is set, and its {name} is not in the cache")
    try:
        get_hf_file_metadata(hf_hub_url(source, name))
    except (OSError, ValueError):  # of the hub: no such model, no permission
        raise
    except Exception as error:  # of the client's HTTP library, which is not the same in every version
        raise ConnectionError(f"no answer from {constants.ENDPOINT}: {error}") from error
