"""Fetch dataset archives over the network and read their pickles, trusting neither."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import pickle
import re
import tarfile
import zlib
from collections.abc import Generator, Sequence
from typing import IO, Any

import numpy as np
import pooch
import requests
from rich.console import Console
from rich.progress import Progress

# Timeout in seconds of Pooch and Requests, to connect and between two reads.
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 16
_USE_A_COPY = "or pass --data-dir with an existing copy"
FETCH_AGAIN = "use a fresh copy of the official archive"

# The errors of `pickle` and of the stand-ins below for invalid pickles of arrays.
_MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


class DatasetError(Exception):
    """A dataset is not available; the message is one line that says why and what to do.

    Examples:
      >>> raise DatasetError("no such folder: /data; pass --data-dir with an existing copy")
      Traceback (most recent call last):
      psclip_optax.training.data.archives.DatasetError: no such folder: /data; pass ...
    """


def fetch_archive(
    url: str, known_hash: str, filename: str, cache_dir: str | pathlib.Path
) -> pathlib.Path:
    """Downloads an archive once; later calls use the copy in the cache, also offline.

    The file gets its name only after its hash has been checked, so no failure leaves a half-written
    or wrong file behind.

    Args:
      url: the URL of the archive, `http` or `https`.
      known_hash: `"<algorithm>:<hex digest>"`, such as `"md5:eb90…"`.
      filename: name of the file in the cache.
      cache_dir: folder of the cache, created if missing.

    Returns:
      The path of the archive in the cache.

    Raises:
      DatasetError: `known_hash` is malformed, the download failed or had another hash, or the
        cache cannot be written.

    Examples:
      >>> import hashlib, pathlib, tempfile
      >>> cache = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (cache / "toy.tar.gz").write_bytes(b"toy")
      >>> md5 = "md5:" + hashlib.md5(b"toy").hexdigest()
      >>> fetch_archive("https://example.org/toy.tar.gz", md5, "toy.tar.gz", cache).name
      'toy.tar.gz'

    References:
      Uieda et al., "Pooch: A friend to fetch your data files", JOSS 2020.
    """
    if not re.fullmatch(r"(md5|sha1|sha256|sha512):[0-9a-fA-F]+", known_hash):
        raise DatasetError(f"expected a hash such as 'md5:<hex digest>', got {known_hash!r}")
    target = pathlib.Path(cache_dir).expanduser() / filename
    # Pooch's own downloader needs tqdm for its bar and leaves connections open.
    downloader: Any = _download
    try:
        with _pooch_quiet():
            pooch.retrieve(url, known_hash, filename, target.parent, downloader=downloader)
    except requests.RequestException as error:
        cached = f" (the cached {target} does not have {known_hash})" if target.exists() else ""
        reason = _why_no_download(error)
        raise DatasetError(
            f"cannot fetch {url}: {reason}{cached}; try again, {_USE_A_COPY}"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(
            f"cannot write {target}: {reason}; make room or choose another cache folder, "
            f"{_USE_A_COPY}"
        ) from error
    except ValueError as error:
        mismatch = str(error).partition(". ")[0]
        raise DatasetError(f"cannot use {url}: {mismatch}; try again, {_USE_A_COPY}") from error
    return target


def _why_no_download(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {_TIMEOUT_SECONDS} seconds"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached, or the connection was lost"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection closed before the whole file had arrived"
    return " ".join(str(error).split())


@contextlib.contextmanager
def _pooch_quiet() -> Generator[None]:
    """Silences Pooch's line about a download, which `_download` shows."""
    logger = pooch.get_logger()
    level_before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level_before)


def _download(url: str, output_file: Any, _pooch: pooch.Pooch | None):
    console = Console(stderr=True)
    if not console.is_terminal:  # no progress bar
        console.print(f"downloading {url}", highlight=False, soft_wrap=True)
    with (
        requests.get(url, stream=True, timeout=_TIMEOUT_SECONDS) as response,
        Progress(console=console, disable=not console.is_terminal) as display,
        pathlib.Path(output_file).open("wb") as file,
    ):
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0)) or None
        task = display.add_task(url.rpartition("/")[2], total=size)
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            display.advance(task, len(chunk))


def read_pickles(
    source: pathlib.Path, folder: str, filenames: Sequence[str]
) -> dict[str, dict[Any, Any]]:
    """Reads pickled dicts from a folder, or from that folder inside a `.tar.gz`.

    Nothing is unpacked to disk: members are found by exact name and read in one pass.

    Args:
      source: the folder that contains the files, or an archive that contains `folder/`.
      folder: name of the folder inside the archive.
      filenames: names of the files in the folder.

    Returns:
      `{filename: its dict}`, see `load_pickle`.

    Raises:
      DatasetError: a file is missing, unreadable, corrupted or not a plain pickle of arrays.

    Examples:
      >>> import pathlib, pickle, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "meta").write_bytes(pickle.dumps({"names": ["cat", "dog"]}))
      >>> read_pickles(folder, "toy", ["meta"])
      {'meta': {'names': ['cat', 'dog']}}
    """
    read = _read_folder if source.is_dir() else _read_tar
    try:
        contents = read(source, folder, filenames)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(f"cannot read {source}: {reason}; {FETCH_AGAIN}") from error
    missing = [name for name in filenames if name not in contents]
    if missing:
        raise DatasetError(f"{source}: expected {folder}/{missing[0]}, not found; {FETCH_AGAIN}")
    return contents


def _read_folder(
    source: pathlib.Path, folder: str, filenames: Sequence[str]
) -> dict[str, dict[Any, Any]]:
    contents = {}
    for name in filenames:
        with (source / name).open("rb") as file:
            contents[name] = load_pickle(file, str(source / name))
    return contents


def _read_tar(
    source: pathlib.Path, folder: str, filenames: Sequence[str]
) -> dict[str, dict[Any, Any]]:
    wanted = {f"{folder}/{name}": name for name in filenames}
    contents = {}
    # Stream mode: seeking back in a gzip file would decompress it from the start again.
    with tarfile.open(source, "r|gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None and member.name in wanted:
                contents[wanted[member.name]] = load_pickle(file, f"{source}:{member.name}")
    return contents


def load_pickle(file: IO[bytes], name: str) -> dict[Any, Any]:
    """Loads a pickled dict of builtins and numeric NumPy arrays, and refuses everything else.

    A pickle is a program. No object that it names is imported: the few globals that a NumPy array
    needs are replaced by inert stand-ins, all others raise. Python 2's `str` is read as `bytes`.

    Args:
      file: opened for reading bytes.
      name: its name in error messages.

    Returns:
      The dict; its arrays are read-only.

    Raises:
      DatasetError: the pickle names any other global, contains an array whose dtype is not bool,
        int or float, is not a dict, or is corrupted.

    Examples:
      >>> import io, pickle
      >>> load_pickle(io.BytesIO(pickle.dumps({"data": np.arange(3)})), "toy")
      {'data': array([0, 1, 2])}
      >>> load_pickle(io.BytesIO(pickle.dumps({"data": print})), "toy")
      Traceback (most recent call last):
      psclip_optax.training.data.archives.DatasetError: toy: refused to load 'builtins.print'...

    References:
      https://docs.python.org/3/library/pickle.html#restricting-globals
    """
    try:
        content = _ArrayUnpickler(file, name).load()
        if not isinstance(content, dict):
            raise DatasetError(
                f"{name}: expected a pickled dict, got a {type(content).__name__}; {FETCH_AGAIN}"
            )
        return {
            key: value.to_numpy(name) if isinstance(value, _PickledArray) else value
            for key, value in content.items()
        }
    except _MALFORMED as error:
        raise DatasetError(
            f"{name}: not a readable pickle ({type(error).__name__}); {FETCH_AGAIN}"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], name: str):
        super().__init__(file, encoding="bytes")
        self._name = name

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        stand_in = _STAND_INS.get((module_name, global_name))
        if stand_in is None:
            # repr, because the name comes from the file and may contain line breaks and escape
            # sequences.
            refused = repr(f"{module_name}.{global_name}")
            raise DatasetError(
                f"{self._name}: refused to load {refused}, which no array needs; {FETCH_AGAIN}"
            )
        return stand_in


# Stand-ins rather than NumPy's own classes: the state that a pickle gives to
# `numpy.dtype.__setstate__` can make NumPy read outside an array's memory.


class _PickledDtype:
    def __init__(self, code: str | bytes, *_: object):
        self.code = code.decode() if isinstance(code, bytes) else code
        self.byte_order = "|"

    def __setstate__(self, state: tuple[Any, ...]):
        order = state[1]
        self.byte_order = order.decode() if isinstance(order, bytes) else order

    def to_numpy(self, name: str) -> np.dtype[Any]:
        code = self.byte_order + self.code
        if not re.fullmatch(r"[|<>=][biuf][1248]", code):
            raise DatasetError(
                f"{name}: expected bool, int or float arrays, got dtype {code!r}; {FETCH_AGAIN}"
            )
        return np.dtype(code)


class _PickledArray:
    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple[Any, ...]):
        _, self.shape, self.dtype, self.is_fortran, self.buffer = state

    def to_numpy(self, name: str) -> np.ndarray:
        flat = np.frombuffer(self.buffer, self.dtype.to_numpy(name))
        array = flat.reshape(self.shape, order="F" if self.is_fortran else "C")
        array.flags.writeable = False
        return array


def _array_from_buffer(buffer: bytes, dtype: _PickledDtype, shape: tuple[int, ...], order: str):
    array = _PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", buffer))
    return array


def _bytes_from_latin1(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("expected a latin1 text, which is how bytes are pickled")
    return text.encode("latin1")


_STAND_INS = {
    ("_codecs", "encode"): _bytes_from_latin1,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
}
