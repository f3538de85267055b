"""Tries to get out of the page what is not on it, and to change something from another site: all are refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from app_process import App, app_at_work
from PIL import Image

from duo import rundir
from duo.app.curation import Curation, Filters
from duo.app.places import Place
from duo.app.reporting import Summary
from duo.app.serving import LOOPBACK_NAMES, Guard
from duo.app.views import Views
from duo.errors import UserError

SECRET = "what nobody on the page may read"
EVIL = "http://evil.example"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a secret beside them and in them."""
    place = tmp_path_factory.mktemp("trespass")
    for side, colour in (("unsafe", 200), ("safe", 10)):
        (place / "own" / side).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (colour, index, 0)).save(place / "own" / side / f"{index:04d}.png")
    for secret in (place / "secret.txt", place / "own/secret.txt", place / "own/unsafe/.env"):
        secret.write_text(SECRET)
    return place


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[App]:
    pytest.importorskip("gradio", reason="the page needs gradio")
    with app_at_work(folder / "own", temporary=folder) as started:
        yield started


@pytest.fixture
def client(app: App) -> Iterator[Any]:
    import httpx

    alone = httpx.Limits(max_keepalive_connections=0)  # on a busy machine the server drops those that wait
    with httpx.Client(base_url=app.url, trust_env=False, timeout=60, limits=alone) as one:
        yield one


# --- files --------------------------------------------------------------------------------------------


def test_no_route_gives_a_file_away(client: Any, folder: Path) -> None:
    files = [folder / "secret.txt", folder / "own/secret.txt", folder / "own/unsafe/0000.png"]
    files += [folder / "own/unsafe/.env", Path("/etc/hostname"), Path(rundir.__file__)]
    own = {path.read_bytes() for path in files if path.is_file()}
    up = "../" * 12
    asked = []
    for path in files:
        plain = str(path)
        for name in (plain, up + plain[1:], quote(plain, safe=""), quote(up, safe="") + plain[1:], f"file://{plain}"):
            asked += [f"{route}{name}" for route in ("gradio_api/file=", "file=", "gradio_api/file/", "file/")]
            asked += [f"{route}{name}" for route in ("static/", "assets/", "svelte/", "gradio_api/stream/a/b/")]
            asked += [f"gradio_api/custom_component/a/client/component/{name}", f"gradio_api/proxy=file://{plain}"]
    asked += ["gradio_api/proxy=http://127.0.0.1:1/", "gradio_api/deep_link?session_hash=../../secret", "dev/reload"]
    asked += ["gradio_api/runs", "gradio_api/vibe-code", "monitoring/summary", "gradio_api/run-history/records"]
    for path in asked:
        answer = client.get("/" + path)
        assert answer.content not in own, path
        assert SECRET not in answer.text, path


def test_what_is_uploaded_stays_in_the_folder_of_the_process(client: Any, folder: Path) -> None:
    before = {path for path in folder.rglob("*") if "duo-app-" not in str(path)}
    for name in ("../../../planted.txt", "..\\planted.txt", "/tmp/planted-by-duo-test.txt", f"{folder}/planted.txt"):
        client.post("/gradio_api/upload", files={"files": (name, b"planted")})
    assert {path for path in folder.rglob("*") if "duo-app-" not in str(path)} == before
    assert not Path("/tmp/planted-by-duo-test.txt").exists()


# --- other sites --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},  # of a sandboxed frame, or a file
        {"host": "evil.example"},  # a name of theirs that was pointed at 127.0.0.1
        {"host": "evil.example", "origin": EVIL},
        {"host": "127.0.0.1.evil.example", "origin": "http://127.0.0.1.evil.example"},
        {"host": "localhost@evil.example"},
        {"host": ""},
    ],
)
def test_no_other_site_changes_or_reads_anything(client: Any, folder: Path, headers: dict[str, str]) -> None:
    data = {"place": 0, "name": "0000", "decision": "reject"}
    told = {"data": data, "fn_name": "decide", "session_hash": "a", "component_id": 1}
    for method, path in (
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/reset"),
        ("POST", "/login"),
        ("GET", "/config"),
        ("GET", "/"),
    ):
        answer = client.request(method, path, json=told if method == "POST" else None, headers=headers)
        assert answer.status_code in (400, 403), (path, headers)  # 400: no such request in HTTP
    assert not (folder / "own/pairs.jsonl").exists()


def test_the_page_itself_may(client: Any, app: App, folder: Path) -> None:
    """The same call from its own address reaches the page, so that the refusals above are not of a wrong call."""
    data = {"place": 0, "name": "no such pair", "decision": "reject"}
    headers = {"origin": app.url.rstrip("/")}
    codes = set()
    for number in range(1, 60):
        told = {"data": data, "fn_name": "decide", "session_hash": "a", "component_id": number}
        codes.add(client.post("/gradio_api/component_server", json=told, headers=headers).status_code)
    assert 200 in codes and 403 not in codes
    assert not (folder / "own/pairs.jsonl").exists()


def test_web_sockets_which_browsers_open_across_sites_are_closed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it was let through")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", b"localhost:1"), (b"origin", EVIL.encode())]}
    asyncio.run(Guard(app, LOOPBACK_NAMES)(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# --- what lies in the folders --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../0000", "unsafe/0000", "/etc/passwd", "0000\x00", "<script>alert(1)</script>", ""])
def test_a_decision_is_of_a_pair_by_its_name(own_folder: Path, name: str) -> None:
    told = Views([Place.at(own_folder)]).decide(0, name, "reject")
    assert "has no pair called" in told["problem"]
    assert not (own_folder / "pairs.jsonl").exists()


def test_links_out_of_a_run_are_not_shown(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.png"
    assert place.pairs is not None and place.run is not None
    image = sorted((place.pairs / "safe").iterdir())[0]
    elsewhere.write_bytes(image.read_bytes())
    assert Curation(place).pairs()
    image.unlink()
    image.symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"0000\.png leads out of .*pairs, so it is not shown"):
        Curation(place).pairs()
    assert "leads out of" in Views([place]).grid(0, Filters()).html

    run = place.run.path
    (tmp_path / "secret.html").write_text(SECRET)
    (run / "report.json").write_text(json.dumps({}))
    (run / "report.html").symlink_to(tmp_path / "secret.html")
    assert "report.html leads out of" in str(Summary.of(place).missing)
    assert SECRET not in Views([place]).report(0)
