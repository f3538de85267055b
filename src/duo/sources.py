"""Where weights come from: ids of the hub and their files, and pickles, which are never read. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duo.errors import UserError, first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # suffixes; to read such a file is to run code that it may hold
HUB = "hub:"  # begins the name of a file or folder on the hub
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@contextmanager
def no_pickles() -> Iterator[None]:
    """Within it torch reads no pickle, whatever a loader asks for: the index of a network's shards may name one."""
    import torch

    def refuse(*_: object, **__: object) -> None:
        raise OSError("it names a pickle, which can run code and is not read")

    was = torch.load
    torch.load = refuse
    try:
        yield
    finally:
        torch.load = was


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(source) is not None


def hub_path(text: str) -> tuple[str, str] | None:
    """`hub:owner/name` or `hub:owner/name/path` as (id, path), the path empty where none is given; None of other text.

    Raises `UserError` where text after `hub:` has another form.
    """
    if not text.startswith(HUB):
        return None
    parts = text.removeprefix(HUB).rstrip("/").split("/")
    source, path = "/".join(parts[:2]), "/".join(parts[2:])
    if not is_hub_id(source) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{text!r} is no place on the hub; expected {HUB}owner/name or {HUB}owner/name/path")
    return source, path


def hub_file(source: str, name: str, *, kind: str, give: str, repo_type: str | None = None) -> Path:
    """The file `name` of the hub model `source`: from the hub, or from the cache where HF_HUB_OFFLINE is set or no
    network answers. `repo_type` "dataset" says that it is a data set.

    Raises `UserError` where it cannot be had: `kind` is what was looked for ("a model"), and `give` is what the user
    may give in its place. Where the file is not in the cache, the hub client alone would try a network that does not
    answer six more times, over half a minute; here the hub is asked once, beforehand.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(source, name, repo_type=repo_type), str):
            _ask(source, name, repo_type)
        return Path(hf_hub_download(source, name, repo_type=repo_type))
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        raise _not_had(source, error, kind=kind, give=give, repo_type=repo_type) from error


def hub_files(source: str, *, kind: str, give: str, repo_type: str | None = None) -> list[str]:
    """The names of the files of the hub model (or data set) `source`; of those in the cache where HF_HUB_OFFLINE is set
    or the hub cannot tell. Raises what `hub_file` does.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.is_offline_mode():
            raise FileNotFoundError("HF_HUB_OFFLINE is set, and nothing of it is in the cache")
        try:
            return sorted(HfApi().list_repo_files(source, repo_type=repo_type))
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise _silent(error) from error
    except (OSError, ValueError) as error:
        try:
            folder = Path(snapshot_download(source, repo_type=repo_type, local_files_only=True))
        except (OSError, ValueError):
            raise _not_had(source, error, kind=kind, give=give, repo_type=repo_type) from error
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _not_had(source: str, error: Exception, *, kind: str, give: str, repo_type: str | None) -> UserError:
    told = f" --repo-type {repo_type}" if repo_type else ""
    return UserError(
        f"{source!r} is neither a folder nor {kind} that the hub client can get ({first_line(error)}); "
        f"give {give}, or run `hf download {source}{told}` where there is a network, and set HF_HUB_OFFLINE=1"
    )


def _silent(error: Exception) -> ConnectionError:
    """An error of the hub client's HTTP library, which is not the same in every version."""
    from huggingface_hub import constants

    return ConnectionError(f"no answer from {constants.ENDPOINT}: {error}")


def _ask(source: str, name: str, repo_type: str | None) -> None:
    """Raise an `OSError` or `ValueError` where the hub does not answer, or has no such file for us."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.is_offline_mode():
        raise FileNotFoundError(f"HF_HUB_OFFLINE is set, and its {name} is not in the cache")
    try:
        get_hf_file_metadata(hf_hub_url(source, name, repo_type=repo_type))
    except (OSError, ValueError):  # of the hub: no such model, no permission
        raise
    except Exception as error:
        raise _silent(error) from error
