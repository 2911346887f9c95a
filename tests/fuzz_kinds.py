"""The kinds of input that are damaged: how a whole sample is made, and what the commands read it with."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

import fuzz_data
import fuzz_models
from fuzz_data import pixels
from fuzzing import Kind
from PIL import Image

from ldm.viewer.pictures import find
from ldm.viewer.server import Gallery, ViewerServer


def _request(folder: Path) -> None:
    for name, asked in {"0": "0/3/0_0.jpg", "1": "pictures.json"}.items():
        lines = (f"GET /SECRET/{asked} HTTP/1.1", "Host: 127.0.0.1", "Range: bytes=0-", "Connection: close", "", "")
        (folder / f"{name}.request").write_text("\r\n".join(lines), newline="")
    Image.fromarray(pixels()).save(folder / "a.png")


def _ask(folder: Path, out: Path) -> None:
    with ViewerServer(Gallery(find([folder / "a.png"]))) as server:
        failed: list[str] = []
        server.handle_error = lambda request, address: failed.append(repr(sys.exception()))
        for path in sorted(folder.glob("*.request")):
            ours, theirs = socket.socketpair()
            thread = threading.Thread(target=server.process_request_thread, args=(theirs, ("127.0.0.1", 1)))
            thread.start()
            with suppress(ConnectionError):  # the server ends a request that is none
                ours.sendall(path.read_bytes().replace(b"SECRET", server.secret.encode()))
                ours.shutdown(socket.SHUT_WR)
                while ours.recv(1 << 16):
                    pass
            ours.close()
            thread.join()
        if failed:
            raise AssertionError(f"the server printed a traceback of {failed[0]}")


KINDS = [*fuzz_data.KINDS, *fuzz_models.KINDS, Kind("page-request", _request, _ask, ("*.request",))]
