"""Who may reach the page, without a browser; `test_browser.py` looks at it with one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from app_process import app_at_work

from duo.app.serving import HEADERS, LOOPBACK_NAMES, Address, Guard, _private_gradio, is_loopback
from duo.cli import main


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.5", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_only_loopback_is_reached_without_a_token(host: str, own: bool) -> None:
    assert is_loopback(host) is own
    assert (Address.of(host=host).token is None) is own
    assert Address.of(host=host, token="long enough for me").token == "long enough for me"


def test_a_token_is_made_anew_each_time_and_is_long() -> None:
    made = {str(Address.of(host="0.0.0.0").token) for _ in range(5)}
    made |= {str(Address.of(token="auto").token) for _ in range(5)}
    assert len(made) == 10
    assert min(map(len, made)) >= 32


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--token", "short"], "--token has 5 characters, expected 12 or more"),
        (["--port", "0"], "--port is 0, expected from 1 to 65535"),
        (["--port", "65536"], "--port is 65536"),
        ([], "no run is named, and there is none in runs/"),
        (["nowhere"], "nowhere is no folder"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["app", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_without_gradio_one_line_says_what_to_install(own_folder: Path) -> None:
    code = (
        "import sys\nsys.modules['gradio'] = None\nfrom duo.cli import main\n"
        f"sys.exit(main(['app', {str(own_folder)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "duo: the page needs gradio: pip install -e '.[app]' in the clone of duo\n"


def test_gradio_is_private_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.delenv("no_proxy", raising=False)
    with _private_gradio():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        assert not {"GRADIO_SHARE", "GRADIO_ALLOWED_PATHS"} & {*os.environ}
        assert os.environ["no_proxy"] == "intranet.example,localhost,127.0.0.1"
        (folder / "left").write_text("")
    assert not folder.exists()
    assert os.environ["GRADIO_SHARE"] == "True"
    assert os.environ["NO_PROXY"] == "intranet.example"
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_where_it_cannot_listen_is_told(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", str(own_folder), "--port", str(port)]) == 2
    told = f"duo: cannot listen on 127.0.0.1, port {port}: Address already in use; give another --port or --host\n"
    assert capsys.readouterr().err.endswith(told)
    assert main(["app", str(own_folder), "--host", "192.0.2.1"]) == 2  # an address for documentation, nobody's own
    assert "duo: cannot listen on 192.0.2.1: Cannot assign requested address" in capsys.readouterr().err


# --- the guard ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"host": "127.0.0.1:7860"}, False),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, False),
        ({"host": "[::1]:7860"}, False),
        ({"host": "localhost"}, False),
        ({"host": "evil.example:7860"}, True),  # a name of theirs that leads to 127.0.0.1
        ({"host": "evil.example"}, True),
        ({}, True),
        ({"host": "127.0.0.1:7860", "origin": "https://evil.example"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, True),
        ({"host": "127.0.0.1:7860", "origin": "null"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://["}, True),  # no address at all
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, False),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, False),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),  # a link
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, True),  # a picture
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, True),  # another port
    ],
)
def test_requests_of_other_sites_are_refused(headers: dict[str, str], refused: bool) -> None:
    assert Guard(None, LOOPBACK_NAMES).refuses(headers) is refused


def test_with_a_token_any_name_of_this_machine_will_do() -> None:
    guard = Guard(None, None)
    assert not guard.refuses({"host": "gpu-box:7860", "origin": "http://gpu-box:7860"})
    assert guard.refuses({"host": "gpu-box:7860", "origin": "http://evil.example"})


@pytest.mark.parametrize(("host", "status"), [("localhost:1", 200), ("evil.example", 403)])
def test_every_answer_tells_the_browser_to_ask_no_one_else(host: str, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Referrer-Policy", b"unsafe-url")]})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, LOOPBACK_NAMES)(scope, None, send))
    assert sent[0]["status"] == status
    headers = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    assert {*HEADERS.items()} <= {*headers}
    assert len([name for name, _ in headers if name.lower() == "referrer-policy"]) == 1
    policy = dict(headers)["content-security-policy"]
    assert "http" not in policy and "*" not in policy


# --- at work ------------------------------------------------------------------------------------------


def test_with_a_token_nothing_is_told_or_done_without_it(own_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    import httpx

    token = "a token of some length"
    with app_at_work(own_folder, "--token", token, temporary=tmp_path) as app:
        assert app.told == [f"user duo, token {token}"]
        with httpx.Client(base_url=app.url, trust_env=False) as client:
            file = f"gradio_api/file={own_folder}/unsafe/0000.png"
            for path in ("config", "gradio_api/queue/data?session_hash=a", file):
                assert client.get(path).status_code in (401, 403, 404), path
            wanted = {"place": 0, "name": "0000", "decision": "reject"}
            asked = {"data": wanted, "fn_name": "decide", "session_hash": "a"}
            codes = {
                client.post("gradio_api/component_server", json={**asked, "component_id": number}).status_code
                for number in range(1, 60)
            }
            assert codes == {401}
            for attempt, status in ((token[:-1], 400), (token, 200)):
                given = {"username": "duo", "password": attempt}
                assert client.post("login", data=given).status_code == status
            assert client.get("config").status_code == 200
            assert client.get(file).status_code in (403, 404)
        (folder,) = tmp_path.glob("duo-app-*")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert app.code == 128 + signal.SIGTERM
    assert not [*tmp_path.glob("duo-app-*")]
    assert not (own_folder / "pairs.jsonl").exists()
