"""From a checkpoint to a packed folder: its matrices go into the packed file, and the small files (configuration,
tokeniser, template) are copied, all into a temporary folder that is renamed at the end: whoever looks sees the finished
folder, the one before, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import ArgumentError, CheckpointError
from .weights.checkpoint import INDEX_FILE
from .weights.packed import PACKED_FILE

_COPIED_SUFFIXES = (".json", ".jinja", ".txt")
_COPIED_NAMES = ("LICENSE", "NOTICE")


def quantize(
    path_or_id: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str | Mapping[str, str] = "int4",
    vision_dtype: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Pack a checkpoint into a folder that `deltaic.load` maps without further work, on any machine.

    path_or_id    a folder with config.json and safetensors, or a Hugging Face hub id
    output        the folder to make
    dtype         "int4", "int8", "bf16", "f32", or a mapping of name patterns (see Precision.parse)
    vision_dtype  format of the vision tower; None: bf16, or f32 where dtype is f32
    overwrite     replace `output` if it is a packed folder already
    threads       None: the physical cores this process may use

    Returns the folder. Needs little memory: one packed matrix passes through it slab by slab. The result is the same,
    bit for bit, as what `deltaic.load` packs in memory. Raises ArgumentError, ConfigError, CheckpointError,
    DeviceError.
    """
    from .chat.prepared import write_prepared
    from .model.config_file import load_config
    from .ops.devices import op_set, use_threads
    from .weights.checkpoint import open_checkpoint
    from .weights.hub import find_model
    from .weights.precision import Precision
    from .weights.streaming import write_packed

    precision = Precision.parse(dtype, vision_dtype)
    ops = op_set("cpu")
    use_threads(ops, threads)
    folder = find_model(path_or_id)
    if (folder / PACKED_FILE).exists():
        raise CheckpointError(f"{folder} is packed already; give the original checkpoint")
    target = Path(output)
    _check_target(target, folder, overwrite)
    config = load_config(folder)
    with open_checkpoint(folder) as checkpoint, _new_folder(target) as temporary:
        _copy_files(folder, temporary)
        write_packed(temporary / PACKED_FILE, checkpoint, config, ops, precision, progress)
        write_prepared(temporary)
    return target


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ArgumentError(f"output: {target.parent} is not a folder; make it first")
    if not os.path.lexists(target):
        return
    if target.resolve() == source.resolve():
        raise ArgumentError(f"output: {target} is the checkpoint itself; give another folder")
    if not target.is_dir() or target.is_symlink():
        raise ArgumentError(f"output: {target} exists and is not a folder; give another name")
    if not any(target.iterdir()):
        return
    if not (target / PACKED_FILE).exists():
        raise ArgumentError(f"output: {target} exists and is not a packed folder; give another name")
    if not overwrite:
        raise ArgumentError(f"output: {target} is a packed folder already; remove it, or allow to overwrite it")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends well, and vanishes if it does not."""
    with _as_checkpoint_error(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp's are private
            _sync(temporary)
            _replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _as_checkpoint_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _replace(temporary: Path, target: Path) -> None:
    """Rename; a folder that is in the way moves aside first and is removed last."""
    if not target.exists():
        temporary.rename(target)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(aside / target.name)
        try:
            temporary.rename(target)
        except BaseException:
            (aside / target.name).rename(target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _copy_files(source: Path, target: Path) -> None:
    """What is not weights: configuration, tokeniser, template, licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES or path.stem in _COPIED_NAMES
        if wanted and path.name != INDEX_FILE and path.is_file():
            shutil.copyfile(path, target / path.name)


def _sync(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk (Windows cannot open folders, and keeps them by itself)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
