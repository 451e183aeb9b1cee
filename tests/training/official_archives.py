"""Make small archives in CIFAR's official layout, and serve them locally."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import socket
import struct
import tarfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


def python2_pickle(value: Any) -> bytes:
    """Pickle dicts, lists, str, int and uint8 arrays like Python 2 (protocol 2)."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, dict):
        items = (_opcodes(key) + _opcodes(item) for key, item in value.items())
        return b"}(" + b"".join(items) + b"u"
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    new_array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\1btR"
    new_dtype = b"cnumpy\ndtype\n(U\2u1K\0K\1tR(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    buffer = _opcodes(value.tobytes())
    return new_array + b"(K\1" + _opcodes(value.shape) + new_dtype + b"\x89" + buffer + b"tb"


class OfficialArchive(NamedTuple):
    """A synthetic dataset: the content of each file, and its `.tar.gz`."""

    dataset: str
    folder: str
    contents: dict[str, dict[bytes, Any]]
    targz: bytes

    @property
    def md5(self) -> str:
        return "md5:" + hashlib.md5(self.targz).hexdigest()

    def with_content(self, **changes: dict[bytes, Any]) -> OfficialArchive:
        contents = {**self.contents, **changes}
        return self._replace(contents=contents, targz=_targz(self.folder, contents))


def cifar10() -> OfficialArchive:
    batches = {f"data_batch_{i}": _batch(i, b"labels", 10) for i in range(1, 6)}
    contents = {
        "batches.meta": {b"num_vis": 3072, b"label_names": _names(10)},
        **batches,
        "test_batch": _batch(6, b"labels", 10),
    }
    folder = "cifar-10-batches-py"
    return OfficialArchive("cifar10", folder, contents, _targz(folder, contents))


def cifar100() -> OfficialArchive:
    contents = {
        "meta": {b"fine_label_names": _names(100), b"coarse_label_names": _names(20)},
        "test": _batch(8, b"fine_labels", 100),
        "train": _batch(9, b"fine_labels", 100),
    }
    folder = "cifar-100-python"
    return OfficialArchive("cifar100", folder, contents, _targz(folder, contents))


def _batch(seed: int, labels_key: bytes, num_classes: int) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=7).tolist()
    return {
        b"data": rng.integers(256, size=(7, 3072), dtype=np.uint8),
        labels_key: labels,
        b"filenames": [b"image_%d.png" % i for i in range(7)],
    }


def _names(num_classes: int) -> list[bytes]:
    return [b"class_%d" % i for i in range(num_classes)]


def _targz(folder: str, contents: dict[str, dict[bytes, Any]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(_directory(folder))
        for name, content in {"readme.html": b"<p>", **contents}.items():
            data = content if isinstance(content, bytes) else python2_pickle(content)
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _directory(name: str) -> tarfile.TarInfo:
    directory = tarfile.TarInfo(name)
    directory.type = tarfile.DIRTYPE
    return directory


class Server(NamedTuple):
    """Serves `bodies[path]`: whole, cut short under `/truncated`, never under `/silent`."""

    url: str
    bodies: dict[str, bytes]
    requested: list[str]


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    bodies: dict[str, bytes] = {}
    requested: list[str] = []
    is_over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            if self.path.startswith("/silent"):
                is_over.wait()
                return
            body = bodies.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            is_truncated = self.path.startswith("/truncated")
            self.wfile.write(body[: len(body) // 2] if is_truncated else body)

        def log_message(self, format: str, *args: Any):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", bodies, requested)
        finally:
            is_over.set()
            server.shutdown()
            thread.join()


def closed_port_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
