"""One file of a hub model, without waiting for a network that is not there. No torch."""

from __future__ import annotations

from pathlib import Path


def hub_file(model: str, name: str) -> Path:
    """A file of a hub model: from the hub, or from the cache where HF_HUB_OFFLINE is set or no network answers.

    Raises `OSError` or `ValueError`, as the hub client does. Where the file is not in the cache, the client alone would
    try a network that does not answer six more times, over half a minute; here the hub is asked once, beforehand.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(model, name), str):
        if constants.is_offline_mode():
            raise FileNotFoundError(f"HF_HUB_OFFLINE is set, and its {name} is not in the cache")
        try:
            get_hf_file_metadata(hf_hub_url(model, name))
        except (OSError, ValueError):  # of the hub: no such model, no permission
            raise
        except Exception as error:  # of the client's HTTP library, which is not the same in every version
            raise ConnectionError(f"no answer from {constants.ENDPOINT}: {error}") from error
    return Path(hf_hub_download(model, name))


def ways_out(model: str) -> str:
    """What to do where `model` cannot be had from the hub; for the end of a message."""
    return f"or run `hf download {model}` where there is a network, and set HF_HUB_OFFLINE=1"
