"""Set-up installs what constraints.txt names, by hashes that requirements/ has, and by nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
PARTS = ("core", "test", "cuda")
FILES = (*PARTS, "torch-cpu")
TEXTS = {part: (REPOSITORY / f"requirements/{part}.txt").read_text() for part in FILES}
EXTRAS = ("test", "nudenet", "app", "ray")  # as the Makefile's installed-test
AGAIN = "write requirements/ again by `make lock`"


def pins(part: str) -> dict[str, Requirement]:
    """Package → what one file says of it."""
    lines = [line.rstrip(" \\") for line in TEXTS[part].splitlines() if line[:1].isalnum()]
    found = {canonicalize_name(one.name): one for one in map(Requirement, lines)}
    assert len(found) == len(lines)
    return found


def test_they_say_the_versions_of_the_constraints() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    found = [(name, str(one.specifier)) for part in PARTS for name, one in pins(part).items()]
    assert sorted(found) == sorted((name, f"=={version}") for name, version in wanted.items()), AGAIN


def test_torch_without_cuda_is_of_the_same_version() -> None:
    assert [f"{one}+cpu" for one in (pins("core")["torch"],)] == [str(one) for one in pins("torch-cpu").values()]


@pytest.mark.parametrize("part", FILES)
def test_every_package_has_hashes_and_there_is_nothing_else(part: str) -> None:
    entry = r"[a-z0-9-]+==[^\s;\\]+(?: ; [^\\\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(rf"(?:# .*\n)*(?:{entry})+", TEXTS[part]), AGAIN


def test_what_the_project_asks_for_is_there() -> None:
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    core, everything = pins("core"), pins("core") | pins("test")
    optional = table["project"]["optional-dependencies"]
    for known, texts in (
        (core, [*table["project"]["dependencies"], *table["build-system"]["requires"]]),
        (everything, [text for extra in EXTRAS for text in optional[extra]]),
    ):
        for one in map(Requirement, texts):
            (pinned,) = known[canonicalize_name(one.name)].specifier
            assert pinned.version in one.specifier, AGAIN


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_set_up_installs_nothing_without_a_hash(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")

    def commands(*given: str) -> list[str]:
        asked = ["make", "--no-print-directory", "-n", ".venv/installed-test", *given]
        told = subprocess.run(asked, cwd=tmp_path, text=True, capture_output=True, check=True).stdout
        return re.findall(r"pip install ([^|\n]*)", told)

    installs = commands()
    assert [re.findall(r"-r requirements/(.+)\.txt", one) for one in installs] == [
        *(["torch-cpu"], ["core"], ["cuda"], [], ["test"]),
    ]
    for one in installs:
        assert "--no-deps" in one
        assert ("--require-hashes" in one and "--only-binary :all:" in one) or "--no-index" in one
    assert not any("--require-hashes" in one for one in commands("HASHES="))
