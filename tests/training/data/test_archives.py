from __future__ import annotations

import errno
import hashlib
import io
import os
import pathlib
import pickle
import tarfile
from typing import Any

import numpy as np
import pooch
import pytest
import requests

from psclip_optax.training.data import archives
from psclip_optax.training.data.archives import (
    DatasetError,
    fetch_archive,
    load_pickle,
    read_pickles,
)
from tests.training.official_archives import Server, closed_port_url, python2_pickle

BODY = bytes(range(256)) * 4096
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


def load(data: bytes) -> dict[Any, Any]:
    return load_pickle(io.BytesIO(data), "toy")


def fetch_error(url: str, cache: pathlib.Path, known_hash: str = MD5) -> str:
    with pytest.raises(DatasetError) as caught:
        fetch_archive(url, known_hash, "toy.tar.gz", cache)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_fetch_downloads_once(server: Server, tmp_path: pathlib.Path):
    server.bodies["/toy.tar.gz"] = BODY
    cached = tmp_path / "cache" / "toy.tar.gz"
    for _ in range(2):
        url = f"{server.url}/toy.tar.gz"
        assert fetch_archive(url, MD5, "toy.tar.gz", cached.parent) == cached
        assert cached.read_bytes() == BODY
    assert server.requested == ["/toy.tar.gz"]
    assert list(cached.parent.iterdir()) == [cached]


def test_download_is_told_once(server: Server, tmp_path, capsys, caplog, monkeypatch):
    server.bodies["/toy.tar.gz"] = BODY
    monkeypatch.setattr(pooch.get_logger(), "handlers", [caplog.handler])
    level = pooch.get_logger().level
    fetch_archive(f"{server.url}/toy.tar.gz", MD5, "toy.tar.gz", tmp_path)
    assert capsys.readouterr().err == f"downloading {server.url}/toy.tar.gz\n"
    assert not caplog.records
    assert pooch.get_logger().level == level


@pytest.mark.parametrize(
    ("path", "known_hash", "expected"),
    [
        ("/toy.tar.gz", "md5:" + "0" * 32, "does not match the known hash"),
        ("/truncated/toy.tar.gz", MD5, "closed before the whole file had arrived"),
        ("/missing.tar.gz", MD5, "404"),
        ("/silent.tar.gz", MD5, "no answer within"),
    ],
)
def test_failed_download_leaves_nothing(
    path: str,
    known_hash: str,
    expected: str,
    server: Server,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(archives, "_TIMEOUT_SECONDS", 0.5)
    server.bodies.update({"/toy.tar.gz": BODY, "/truncated/toy.tar.gz": BODY})
    message = fetch_error(server.url + path, tmp_path, known_hash)
    assert expected in message
    assert server.url + path in message
    assert "--data-dir" in message
    assert not list(tmp_path.iterdir())


def test_no_network_leaves_nothing(server: Server, tmp_path: pathlib.Path):
    assert "cannot be reached" in fetch_error(f"{closed_port_url()}/toy.tar.gz", tmp_path)
    assert not list(tmp_path.iterdir())


def test_malformed_url_is_an_error(tmp_path: pathlib.Path):
    assert "nowhere" in fetch_error("nowhere", tmp_path)
    assert not list(tmp_path.iterdir())


def test_corrupted_cache_is_fetched_again(server: Server, tmp_path: pathlib.Path):
    server.bodies["/toy.tar.gz"] = BODY
    (tmp_path / "toy.tar.gz").write_bytes(BODY[:100])
    path = fetch_archive(f"{server.url}/toy.tar.gz", MD5, "toy.tar.gz", tmp_path)
    assert path.read_bytes() == BODY


def test_corrupted_cache_without_network_is_named(server: Server, tmp_path: pathlib.Path):
    (tmp_path / "toy.tar.gz").write_bytes(BODY[:100])
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    message = fetch_error(f"{closed_port_url()}/toy.tar.gz", tmp_path)
    assert f"{tmp_path / 'toy.tar.gz'} does not have {MD5}" in message
    assert (tmp_path / "other.tar.gz").read_bytes() == b"other"
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_below_a_file_is_an_error(server: Server, tmp_path: pathlib.Path):
    (tmp_path / "file").write_bytes(b"kept")
    message = fetch_error(f"{server.url}/toy.tar.gz", tmp_path / "file" / "cache")
    assert "cannot write" in message
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert not server.requested


def test_full_disk_leaves_nothing(
    server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def fill_disk(response: requests.Response, chunk_size: int):
        yield BODY[:chunk_size]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(requests.Response, "iter_content", fill_disk)
    server.bodies["/toy.tar.gz"] = BODY
    message = fetch_error(f"{server.url}/toy.tar.gz", tmp_path)
    assert os.strerror(errno.ENOSPC) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("known_hash", ["", "eb9058c3", "md5:", "md5:xyz", "crc:eb90"])
def test_malformed_hash_is_an_error(known_hash: str, server: Server, tmp_path: pathlib.Path):
    assert repr(known_hash) in fetch_error(f"{server.url}/toy.tar.gz", tmp_path, known_hash)
    assert not server.requested


ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    np.arange(24, dtype=">i4").reshape(2, 3, 4)[:, ::2],
    np.linspace(-1, 1, 5, dtype=np.float32),
    np.array([True, False]),
]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_round_trip(array: np.ndarray, protocol: int):
    content = {b"data": array, b"labels": [0, -1, 2**40], "name": "tea", b"raw": b"\xff\0"}
    loaded = load(pickle.dumps(content, protocol))
    assert loaded.keys() == content.keys()
    np.testing.assert_array_equal(loaded[b"data"], array, strict=True)
    assert {**loaded, b"data": 0} == {**content, b"data": 0}


def test_python2_strings_are_bytes():
    data = np.arange(256, dtype=np.uint8).reshape(2, 128)
    loaded = load(python2_pickle({b"data": data, b"labels": [3, 1], b"names": [b"caf\xe9"]}))
    assert loaded[b"labels"] == [3, 1]
    assert loaded[b"names"] == [b"caf\xe9"]
    np.testing.assert_array_equal(loaded[b"data"], data, strict=True)


class Reduced:
    """Pickles as a call of `function`, then `__setstate__(state)` on its result."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.reduced = function, args, state

    def __reduce__(self):
        return self.reduced


def call_global(module: str, name: str, *args: Any) -> bytes:
    """Return a pickle that calls a global; since protocol 4 its name may have dots."""
    names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + names + b"\x93" + pickle.dumps(args, 2)[2:-1] + b"R."


ATTACKS = {
    "os.system": lambda marker: pickle.dumps({b"data": Reduced(os.system, f"echo > '{marker}'")}),
    "eval": lambda marker: call_global("builtins", "eval", f"open({str(marker)!r}, 'w')"),
    "python2": lambda marker: (
        b"c__builtin__\neval\n(" + f"Vopen({str(marker)!r}, 'w')\n".encode() + b"tR."
    ),
    "dotted": lambda marker: call_global("tarfile", "os.system", f"echo > '{marker}'"),
    "numpy.save": lambda marker: call_global("numpy", "save", str(marker), 0),
    "numpy.testing": lambda marker: call_global(
        "numpy.testing", "runstring", f"open({str(marker)!r}, 'w')", {}
    ),
    "ndarray.tofile": lambda marker: call_global(
        "numpy", "ndarray.tofile", np.zeros(1), str(marker)
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_attacks_do_not_run(name: str, tmp_path: pathlib.Path):
    marker = tmp_path / "marker.npy"
    attack = ATTACKS[name](marker)
    with pytest.raises(DatasetError, match="refused to load"):
        load(attack)
    assert not marker.exists()
    pickle.loads(attack)
    assert marker.exists(), "this attack harms nobody, so that refusing it proves nothing"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "getattr"),
        ("builtins", "dict"),
        ("copyreg", "_reconstructor"),
        ("copyreg", "__newobj__"),
        ("functools", "partial"),
        ("_codecs", "decode"),
        ("numpy", "load"),
        ("numpy", "memmap"),
        ("numpy", "dtype.type"),
        ("numpy._core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct.__self__"),
        ("psclip_optax.training.data.archives", "_PickledArray"),
        ("line\nbreak", "\x1b[2J"),
    ],
)
def test_other_globals_are_refused_by_name(module: str, name: str):
    with pytest.raises(DatasetError, match="toy: refused to load") as caught:
        load(call_global(module, name))
    assert repr(f"{module}.{name}") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", None], dtype=object),
        np.zeros(2, [("a", "u1"), ("b", object)]),
        np.zeros(2, "V8"),
        np.array(["text"]),
        np.zeros(2, np.complex64),
        np.zeros(2, "datetime64[s]"),
    ],
    ids=lambda array: array.dtype.name,
)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_other_dtypes_are_refused(array: np.ndarray, protocol: int):
    with pytest.raises(DatasetError, match=r"bool, int or float arrays|which no array needs"):
        load(pickle.dumps({b"data": array}, protocol))


def pickled_array(dtype: Any, shape: Any, buffer: Any) -> bytes:
    reconstruct, args, _ = np.zeros(0).__reduce__()[:3]
    return pickle.dumps({b"data": Reduced(reconstruct, *args, state=(1, shape, dtype, 0, buffer))})


def pickled_dtype(byte_order: str, code: str = "u1") -> Reduced:
    return Reduced(np.dtype, code, state=(3, byte_order, None, None, None, -1, -1, 0))


@pytest.mark.parametrize(
    "forged",
    [
        pickled_array(pickled_dtype("|"), (5,), b"four"),
        pickled_array(pickled_dtype("|"), (2**62, 2**62), b"four"),
        pickled_array(pickled_dtype("|"), (4,), 2**40),
        pickled_array(pickled_dtype("|"), "shape", b"four"),
        pickled_array(pickled_dtype("O,"), (4,), b"four"),
        pickled_array(pickled_dtype("(2,2)"), (1,), b"four"),
        pickled_array(pickled_dtype("<", "O8"), (1,), b"pointers"),
        pickled_array(None, (4,), b"four"),
        pickle.dumps({b"data": Reduced(np.dtype, "u1", state=(3,))}),
        call_global("_codecs", "encode", "uryyb", "rot13"),
        call_global("_codecs", "encode", 5, "latin1"),
        call_global("numpy.core.multiarray", "_reconstruct"),
        b"Pother process\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\xff.",
        pickle.dumps([b"no dict"]),
    ],
)
def test_forged_pickles_are_refused(forged: bytes):
    with pytest.raises(DatasetError, match=r"^toy: ") as caught:
        load(forged)
    assert "\n" not in str(caught.value)


def test_every_truncated_pickle_is_refused():
    whole = pickle.dumps({b"data": np.arange(9), b"labels": [1, 2, 3]}, protocol=2)
    for size in range(len(whole)):
        with pytest.raises(DatasetError, match=r"^toy: not a readable pickle"):
            load(whole[:size])


def write_tar(path: pathlib.Path, members: dict[str, bytes], links: dict[str, str] | None = None):
    with tarfile.open(path, "w:gz") as archive:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_tar_members_are_read_by_exact_name(tmp_path: pathlib.Path):
    wanted, other = pickle.dumps({"is": "wanted"}), pickle.dumps({"is": "other"})
    names = ["toy/metadata", "meta", "../toy/meta", "toy/toy/meta", "/toy/meta"]
    write_tar(tmp_path / "toy.tar.gz", {**dict.fromkeys(names, other), "toy/meta": wanted})
    contents = read_pickles(tmp_path / "toy.tar.gz", "toy", ["meta"])
    assert contents == {"meta": {"is": "wanted"}}
    assert list(tmp_path.iterdir()) == [tmp_path / "toy.tar.gz"]


def test_tar_links_are_not_followed(tmp_path: pathlib.Path):
    outside = tmp_path / "outside"
    outside.write_bytes(pickle.dumps({"is": "outside"}))
    write_tar(tmp_path / "toy.tar.gz", {}, links={"toy/meta": str(outside)})
    with pytest.raises(DatasetError, match="expected toy/meta, not found"):
        read_pickles(tmp_path / "toy.tar.gz", "toy", ["meta"])


def test_every_truncated_tar_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "toy.tar.gz"
    noise = np.random.default_rng(0).bytes(3000)
    write_tar(path, {"toy/meta": pickle.dumps({"noise": noise})})
    whole = path.read_bytes()
    for size in range(0, len(whole) - 8, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"toy\.tar\.gz"):
            read_pickles(path, "toy", ["meta"])


def test_corrupted_tar_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "toy.tar.gz"
    write_tar(path, {"toy/meta": pickle.dumps({"noise": np.random.default_rng(0).bytes(3000)})})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 :] = bytes(len(damaged) - len(damaged) // 2)
    for content in (bytes(damaged), b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"toy\.tar\.gz") as caught:
            read_pickles(path, "toy", ["meta"])
        assert "\n" not in str(caught.value)


def test_missing_file_in_folder_is_named(tmp_path: pathlib.Path):
    with pytest.raises(DatasetError, match=r"cannot read .*meta"):
        read_pickles(tmp_path, "toy", ["meta"])
