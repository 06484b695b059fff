"""Where do packed weights come from? From a checkpoint (packer.py) or a packed folder (packed.py): both answer the same
questions, so that weights/build.py describes the model once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from ..model.weights import Array, Weight

Transform = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


class Source(Protocol):
    """Weights by key. Keys and names are checkpoint names without the prefix of the language or vision model."""

    where: str  # file or folder, for messages

    @property
    def has_mtp(self) -> bool:
        """Whether there is a multi-token-prediction layer."""
        ...

    def progress_bar(
        self, title: str, prefixes: tuple[str, ...] | None, progress: bool | None
    ) -> AbstractContextManager[None]:
        """Shows how far the part of the model under `prefixes` (None: the decoder) has come."""
        ...

    def matrix(self, key: str, names: Sequence[str] | None = None) -> Weight:
        """The tensors `names` (None: `key`.weight), which read the same input, as one matrix."""
        ...

    def glu(self, key: str, prefix: str) -> Weight:
        """`gate_proj` and `up_proj` under `prefix` as one matrix for `swiglu`."""
        ...

    def experts(self, prefix: str, count: int) -> tuple[Weight, Weight]:
        """gate_up and down of all experts under `prefix`."""
        ...

    def affine(self, key: str, transform: Transform | None = None) -> tuple[Weight, Array]:
        """`key`.weight (after `transform`) and `key`.bias."""
        ...

    def vector(self, name: str, transform: Transform | None = None) -> Array:
        """A float32 array, after `transform`."""
        ...

    def check_tied_head(self) -> None:
        """Raises CheckpointError if a head is stored that is not the embedding though the two are tied."""
        ...


@contextmanager
def progress_bar(title: str, total: int, progress: bool | None) -> Iterator[Any]:
    """A bar for `total` bytes on stderr (None instead of a bar where there is none).

    `progress`: True shows it, False does not, None does if stderr is a terminal.
    """
    show = sys.stderr is not None and sys.stderr.isatty() if progress is None else progress
    if not show:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True) as bar:
        yield bar


class KeyRecorder:
    """A `Source` that holds nothing: after the model was built from it, `matrices` and `vectors` are its keys."""

    def __init__(self, where: str, *, has_mtp: bool):
        self.where, self.has_mtp = where, has_mtp
        self.matrices: list[str] = []
        self.vectors: list[str] = []

    def progress_bar(
        self, title: str, prefixes: tuple[str, ...] | None, progress: bool | None
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def matrix(self, key: str, names: Sequence[str] | None = None) -> Any:
        self.matrices.append(key)

    def glu(self, key: str, prefix: str) -> Any:
        self.matrices.append(key)

    def experts(self, prefix: str, count: int) -> Any:
        self.matrices += [prefix + "gate_up_proj", prefix + "down_proj"]
        return None, None

    def affine(self, key: str, transform: Transform | None = None) -> Any:
        self.matrices.append(key)
        self.vectors.append(key + ".bias")
        return None, None

    def vector(self, name: str, transform: Transform | None = None) -> Any:
        self.vectors.append(name)

    def check_tied_head(self) -> None:
        pass
