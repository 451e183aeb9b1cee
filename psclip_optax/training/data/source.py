"""Define the entry of a data set in the register."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from psclip_optax.training.data.splits import Dataset, DatasetShape

_Path: TypeAlias = str | os.PathLike[str]


class Origin(NamedTuple):
    """The places from which `load_dataset` may load a data set.

    Attributes:
      data_dir: an existing copy.
      cache_dir: folder for downloads; the user's cache folder by default.
      url: a mirror.
      known_hash: `"<algorithm>:<hex digest>"` of the mirror's archive.
    """

    data_dir: _Path | None
    cache_dir: _Path | None
    url: str | None
    known_hash: str | None


class Source(NamedTuple):
    """A data set that can be loaded.

    Attributes:
      title: name in tables and figures.
      shape: the shape of an image, and the number of classes.
      load: a function from an origin to the data set.
      comes_with: the library that contains it; None if it has separate files.
    """

    title: str
    shape: DatasetShape
    load: Callable[[Origin], Dataset]
    comes_with: str | None = None
