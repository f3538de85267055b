"""Who may reach the page, and what may leave it: this machine's browser alone, and nothing.

Without another `--host` it listens on the loopback address. Requests that name another host (a web page that points a
name of its own at 127.0.0.1) or come from another site are refused, the browser is told to ask no other host for
anything, and gradio's telemetry is off. What gradio writes lies in a folder of this process, removed at the end.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from duo.app.places import Place, find_places
from duo.errors import UserError, first_line
from duo.rundir import note

SHORTEST_TOKEN = 12
MAKE_ONE = "auto"  # of `--token`: too short to be one
USER = "duo"  # of the login page; what counts is the token
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MISSING = "the page needs gradio: pip install -e '.[app]' in the clone of duo"
HEADERS = {
    # Scripts and styles are gradio's own, which has many of them within the page, and compiles templates.
    "content-security-policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the page listens and who may enter; the `token` is None only where it is not asked for."""

    host: str
    port: int | None
    token: str | None

    @classmethod
    def of(cls, *, host: str = "127.0.0.1", port: int | None = None, token: str | None = None) -> Address:
        """A host that other machines can reach has a token, made here if none is given, or where "auto" is."""
        if port is not None and not 0 < port < 2**16:
            raise UserError(f"--port is {port}, expected from 1 to {2**16 - 1}")
        if token is not None and token != MAKE_ONE and len(token) < SHORTEST_TOKEN:
            expected = f"expected {SHORTEST_TOKEN} or more, or {MAKE_ONE} to have one made"
            raise UserError(f"--token has {len(token)} characters, {expected}")
        if token == MAKE_ONE or (token is None and not is_loopback(host)):
            token = secrets.token_urlsafe(24)
        return cls(host=host.strip("[]"), port=port, token=token)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own address, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def serve(paths: Sequence[Path], address: Address, *, device: str = "cpu") -> None:
    """Show the page until it is interrupted."""
    places = find_places(paths)
    signal.signal(signal.SIGTERM, _leave)
    with shown(places, address, device=device) as url:
        print(url, flush=True)  # noqa: T201
        if address.token is not None:
            print(f"user {USER}, token {address.token}", flush=True)  # noqa: T201
            if not is_loopback(address.host):
                note("other machines can reach this page, and what is sent is not encrypted; a tunnel would be")
        threading.Event().wait()


@contextmanager
def shown(places: Sequence[Place], address: Address, *, device: str = "cpu") -> Iterator[str]:
    """The page at work for as long as the context lasts; its URL. `UserError` where gradio or a port is missing."""
    _try(address)
    with _private_gradio():
        try:
            from starlette.middleware import Middleware

            from duo.app import page
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("gradio", "starlette"):
                raise
            raise UserError(MISSING) from None
        from duo.app.views import Views

        blocks = page.build(Views(places, device=device))
        hosts = (*LOOPBACK_NAMES, address.host) if is_loopback(address.host) else None
        try:
            _, url, _ = blocks.launch(
                server_name=f"[{address.host}]" if ":" in address.host else address.host,
                server_port=address.port,
                auth=None if address.token is None else (USER, address.token),
                auth_message=f"The user is {USER}, the password is the token that `duo app` printed.",
                share=False,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                show_error=True,
                footer_links=[],
                run_history=False,
                allowed_paths=[],
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)]},
                theme=page.theme(),
                css=page.CSS,
            )
        except OSError as error:
            raise _unheard(address, first_line(error)) from None
        try:
            yield url
        finally:
            blocks.close(verbose=False)


def _try(address: Address) -> None:
    """Listen for a moment, so that a port in use or a host that is not ours is told before seconds of imports."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port or 0), family=family).close()
    except (UnicodeError, TypeError) as error:  # a name that is none: over 63 letters, or with what no host has
        raise _unheard(address, first_line(error)) from None
    except OSError as error:
        raise _unheard(address, (error.strerror or first_line(error)).partition(" (while")[0]) from None


def _unheard(address: Address, reason: str) -> UserError:
    place = f"{address.host}, port {address.port}" if address.port else address.host
    return UserError(f"cannot listen on {place}: {reason}; give another --port or --host")


@contextmanager
def _private_gradio() -> Iterator[None]:
    """Gradio with no settings but ours, no telemetry, and a folder for its files that goes when the context ends.

    Its environment variables could share the page, open folders to it or send its files elsewhere.
    """
    with tempfile.TemporaryDirectory(prefix="duo-app-") as folder:
        direct = ",".join(filter(None, (os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "localhost,127.0.0.1")))
        ours = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": folder,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": direct,  # gradio asks itself whether it is up
            "no_proxy": direct,
        }
        before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_") or name in ours}
        for name in before:
            del os.environ[name]
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)
            os.environ.update(before)


class Guard:
    """ASGI middleware: refuses WebSockets and requests of other sites' pages, and adds `HEADERS` to every answer."""

    def __init__(self, app: Any, hosts: Sequence[str] | None) -> None:
        self._app = app
        self._hosts = hosts  # that requests may name; None: any

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # the page has none, and browsers let pages of other sites open them
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                told = [one for one in message.get("headers", ()) if one[0].decode().lower() not in HEADERS]
                told += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": told}
            await send(message)

        given = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.refuses(given):
            await answer({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await answer({"type": "http.response.body", "body": b"refused: this page is asked for by its own address"})
            return
        await self._app(scope, receive, answer)

    def refuses(self, headers: Mapping[str, str]) -> bool:
        """Whether a request names a host that is not ours, or was made by a page of another origin."""
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if self._hosts is not None and name not in self._hosts:
            return True
        # As browsers say of what a page loads without an origin, such as pictures and scripts. Links are let through,
        # and so are frames, which the answer's frame-ancestors keeps from being shown.
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return True
        origin = headers.get("origin")
        try:
            return origin is not None and urlsplit(origin).netloc != host
        except ValueError:  # it is no address
            return True


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process by way of what is to be put in order first, which a signal alone would not."""
    raise SystemExit(128 + number)
