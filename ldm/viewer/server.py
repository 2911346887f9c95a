"""The viewer's server: the page, and tiles of the given pictures. It gives out nothing else.

Addresses begin with a secret of the run, so that other users of the machine cannot look; hosts that a browser was told
by another site's name are refused (DNS rebinding); the page loads nothing from elsewhere.
"""

from __future__ import annotations

import io
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import webbrowser
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ldm.errors import UserError, note
from ldm.images.pictures import notes_of
from ldm.images.slides import Slide
from ldm.viewer.pictures import Source, describe, find

TILE = 510  # px of a tile without its border
BORDER = 1  # px that neighbouring tiles share
THUMBNAIL = 360  # px of the longer side
QUALITY = 95
KEPT_OPEN = 6  # pictures
FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
    "viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
    "views.js": ("views.js", "text/javascript; charset=utf-8"),
    "openseadragon.js": ("openseadragon/openseadragon.min.js", "text/javascript; charset=utf-8"),
}
OPENSEADRAGON_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  # the one rule that it adds
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {OPENSEADRAGON_STYLE}; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gallery:
    """The pictures of one run by number, opened when they are looked at, a few at a time.

    Args:
        sources: what was asked for.
        mpp: micrometres per pixel of pictures that do not say it.
    Raises:
        UserError: none of the pictures can be read.
    Attributes:
        told: what the page is told of each picture (`describe`); of one that cannot be read its name, and why.
    """

    def __init__(self, sources: Sequence[Source], mpp: float | None = None) -> None:
        self.sources = list(sources)
        self.told = [self._tell(source, mpp) for source in self.sources]
        self._open: OrderedDict[int, tuple[Slide, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()
        if len(self.failed) == len(self.told):
            why = "; ".join([*dict.fromkeys(self.failed)][:3]) or "none was given"
            raise UserError(f"no picture can be shown: {why}")

    @staticmethod
    def _tell(source: Source, mpp: float | None) -> dict[str, Any]:
        try:
            about = describe(source)
            return about | {"mpp": about["mpp"] or mpp, "listed": source.listed}
        except UserError as error:
            return {"name": source.picture.file, "why": str(error), "listed": source.listed}

    @property
    def failed(self) -> list[str]:
        """Why pictures cannot be shown, those that cannot."""
        return [told["why"] for told in self.told if "why" in told]

    def _picture(self, number: int) -> tuple[Slide, threading.Lock]:
        with self._lock:
            if number not in self._open:
                self._open[number] = (self.sources[number].picture.open(), threading.Lock())
                if len(self._open) > KEPT_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def tile(self, number: int, level: int, col: int, row: int) -> np.ndarray | None:
        """A Deep Zoom tile (h, w, 3) uint8, None if there is none. Level n halves level n + 1, the last is whole."""
        width, height = self.told[number]["width"], self.told[number]["height"]
        last = (max(width, height) - 1).bit_length()
        if level > last:
            return None
        factor = 2 ** (last - level)
        level_w, level_h = -(-width // factor), -(-height // factor)
        x0, y0 = col * TILE - BORDER * (col > 0), row * TILE - BORDER * (row > 0)
        x1, y1 = min((col + 1) * TILE + BORDER, level_w), min((row + 1) * TILE + BORDER, level_h)
        if x1 - x0 <= BORDER * (col > 0) or y1 - y0 <= BORDER * (row > 0):
            return None
        box = [value * factor for value in (x0, y0)] + [min(x1 * factor, width), min(y1 * factor, height)]
        picture, lock = self._picture(number)
        with lock:
            return picture.read_in_parts(*box[:2], box[2] - box[0], box[3] - box[1], (x1 - x0, y1 - y0))

    def thumbnail(self, number: int) -> np.ndarray:
        """The whole picture, its longer side at most THUMBNAIL px, (h, w, 3) uint8."""
        width, height = self.told[number]["width"], self.told[number]["height"]
        scale = min(1.0, THUMBNAIL / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return self.sources[number].picture.open().read_in_parts(0, 0, width, height, size)


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def host_allowed(header: str, bound: str) -> bool:
    """Whether a Host header is one that a browser sends to a server bound to `bound` when its user typed the address.

    A site that points its own name at this machine (DNS rebinding) sends that name. Numbers cannot be rebound.

    >>> host_allowed("127.0.0.1:8000", bound="127.0.0.1"), host_allowed("evil.example", bound="127.0.0.1")
    (True, False)
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    local = _is_loopback(bound)
    try:
        return ipaddress.ip_address(name).is_loopback or not local
    except ValueError:
        own = () if local else (bound.lower(), socket.gethostname().lower(), socket.getfqdn().lower())
        return name in ("localhost", *own)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ViewerServer(ThreadingHTTPServer):
    """Serves a gallery at `url`. port 0 is a free one. UserError if the address cannot be had."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, host: str = "127.0.0.1", port: int = 0) -> None:
        self.gallery, self.host, self.secret = gallery, host, secrets.token_urlsafe(16)
        told = {"pictures": gallery.told, "tile": TILE, "border": BORDER}
        self.page = json.dumps(told).encode()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot serve at {host}, port {port}: {error}. Leave out --port for a free one, and --host for this "
                "machine alone."
            ) from None

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return _is_loopback(self.host)

    @property
    def url(self) -> str:
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(self.host, self.host)
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.server_address[1]}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away needs no traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(paths: Sequence[Path], host: str, port: int, browser: bool, mpp: float | None) -> None:
    """`histoldm view`: serve pictures until Ctrl-C.

    >>> serve([Path("tiles")], "127.0.0.1", 0, browser=False, mpp=None)
    Traceback (most recent call last):
    ldm.errors.UserError: there is nothing at tiles; give images, slides, OME-Zarr, or folders of them.
    """
    gallery = Gallery(find(paths), mpp)
    shown = [source.picture for source, told in zip(gallery.sources, gallery.told) if "why" not in told]
    for message in [*dict.fromkeys(gallery.failed), *notes_of(shown)]:
        note(message)
    with ViewerServer(gallery, host, port) as server:
        print(f"{len(shown)} pictures at {server.url}  (Ctrl-C ends it)", flush=True)
        if not server.local:
            print(
                "warning: whoever can reach this machine and has the address can look at these pictures, without "
                "encryption. For slides of patients leave out --host and go through ssh -L.",
                file=sys.stderr,
            )
        if browser and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform != "linux"):
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the page, its four files, the list of pictures, tiles and thumbnails."""

    server: ViewerServer
    server_version, sys_version = "HistoLDM", ""
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not host_allowed(self.headers.get("Host", ""), self.server.host):
            self._send(HTTPStatus.FORBIDDEN, b"this host name is not served")
            return
        try:
            secret, _, route = urlsplit(self.path).path.removeprefix("/").partition("/")
        except ValueError:
            self._send(HTTPStatus.BAD_REQUEST, b"this is no address of a page")
            return
        if not secrets.compare_digest(secret.encode(), self.server.secret.encode()):
            self._send(HTTPStatus.NOT_FOUND, b"no such page: open the whole address that histoldm view printed")
            return
        try:
            found = self._find(route)
        except UserError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode())
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, b"no such page")
        else:
            self._send(HTTPStatus.OK, *found)

    do_HEAD = do_GET

    def _find(self, route: str) -> tuple[bytes, str] | None:
        """Content and type of a route after the secret. File names never come from the request."""
        if route in FILES:
            name, kind = FILES[route]
            return resources.files("ldm.viewer").joinpath("static", name).read_bytes(), kind
        if route == "pictures.json":
            return self.server.page, "application/json"
        gallery = self.server.gallery
        if match := re.fullmatch(r"(\d{1,9})/(?:thumbnail|(\d{1,2})/(\d{1,7})_(\d{1,7}))\.jpg", route, re.ASCII):
            number, *place = (int(part) for part in match.groups() if part is not None)
            if number < len(gallery.told) and "why" not in gallery.told[number]:
                pixels = gallery.tile(number, *place) if place else gallery.thumbnail(number)
                return None if pixels is None else (_jpeg(pixels), "image/jpeg")
        return None

    def _send(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "private, max-age=86400" if kind == "image/jpeg" else "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed."""
