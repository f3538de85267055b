"""Weights that others published as pickles: read from safetensors, or from that very file and no other.

A `.pth` is a pickle, and to read one is to run code that it may hold. So it is read only where its bytes have the hash
that its publisher put into its name, and then by torch's reader of tensors alone (`weights_only`). A `.safetensors` of
the same tensors stands in for it.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duo.checkpoint import read_tensors
from duo.errors import UserError, first_line
from duo.sources import hub_file, hub_path

HASHED = re.compile(r"-([0-9a-f]{8,64})\.pth")  # torch.hub's custom: the name ends in the first digits of the sha256


@dataclass(frozen=True, kw_only=True)
class Published:
    """A network's weights: what it is called in messages, and the names that its file has in the wild."""

    what: str
    files: tuple[str, ...]  # each ends in its sha256's first digits

    def find(self, given: str | None, *, field: str) -> Path:
        """Where the file lies: what was `given` for `field` (a path or `hub:owner/name/file`), or else one of `files`,
        or a `.safetensors` of that name, where torch keeps what it downloads. Nothing is read.

        Raises `UserError` where it is not there, in one line that says where to put which file.
        """
        if given is not None:
            return _given(given, what=self.what, field=field)
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        for name in self.files:
            for path in (folder / Path(name).with_suffix(".safetensors"), folder / name):
                if path.is_file():
                    return path
        safe = Path(self.files[0]).with_suffix(".safetensors").name
        raise UserError(
            f"{self.what} is not on this machine: put {self.files[0]} (or its tensors as {safe}) into {folder}, or "
            f"give {field} its path"
        )

    def read(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file that `find` found; a pickle must be one of `files`, byte for byte."""
        if path.suffix == ".safetensors":
            return read_tensors(path, todo="fetch it again")[0]
        hashes = [found[1] for name in self.files if (found := HASHED.search(name))]
        return read_pickle(path, hashes, what=self.what)


def _given(given: str, *, what: str, field: str) -> Path:
    place = hub_path(given)
    if place is not None:
        source, name = place
        if not name:
            raise UserError(f"{field} is {given!r}, which names no file; expected hub:owner/name/file.safetensors")
        return hub_file(source, name, kind=f"{what} (its {name})", give=f"{field} a local file")
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(f"{field} is {given!r}, and there is no such file; give the path of {what}")
    return path


def read_pickle(path: Path, hashes: list[str], *, what: str) -> dict[str, Tensor]:
    """The tensors of a pickle whose sha256 begins with one of `hashes`; any other is not opened: a `UserError`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not any(found.startswith(wanted) for wanted in hashes):
        raise UserError(
            f"{path} is not {what} as it was published (its sha256 begins with {found[:8]}, not "
            f"{' or '.join(one[:8] for one in dict.fromkeys(hashes))}), and a pickle of anybody else is never read; "
            "fetch it again, or save its tensors as .safetensors"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as {what}: {first_line(error)}; fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise UserError(f"{path} holds no state dict of {what}; fetch it again")
    return dict(tensors)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes, in the order of the names: the same for the same weights in any file."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        total.update(plain.numpy().tobytes())
    return total.hexdigest()
