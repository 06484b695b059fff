"""From a folder or a hub id to a model: finds the files, checks memory, packs or maps the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .api import NO_MTP, Model
from .arguments import choice, describe, integer
from .errors import ArgumentError, CheckpointError, DeviceError
from .generate.speculate import MODES
from .memory import check_context, checkpoint_bytes, default_cache_bytes
from .ops.devices import kv_dtypes, op_set, use_threads
from .ops.layout import KV_DTYPES

if TYPE_CHECKING:
    from .model.config import ModelConfig
    from .model.mtp import MtpModel
    from .model.state import State
    from .model.text import TextModel
    from .model.vision import VisionModel
    from .weights.precision import Precision
    from .weights.source import Source

MEMORY = ("map", "copy")
SCREENED_BYTES = 32 << 20  # a smaller head stays in the caches


def load(
    path_or_id: str | Path,
    *,
    dtype: str | Mapping[str, str] | None = None,
    vision_dtype: str | None = None,
    activations: str = "int8",
    device: str = "cpu",
    threads: int | None = None,
    kv_dtype: str | None = None,
    memory: str = "map",
    verify: bool = True,
    context: int | None = None,
    cache_bytes: int | None = None,
    cache_folder: str | Path | None = None,
    cache_folder_bytes: int | None = None,
    speculate: str = "auto",
    screen: bool = True,
    progress: bool | None = None,
) -> Model:
    """Load a checkpoint, or a folder that `deltaic quantize` packed.

    path_or_id    a folder with config.json and weights, or a Hugging Face hub id such as "Qwen/Qwen3.5-0.8B"
    dtype         how weight matrices are stored: "bf16" (default), "f32", "int8", "int4", or a mapping of name patterns
                  for finer control: {"default": "int4", "lm_head": "int8", "layers.0.*": "bf16"} (patterns: see
                  deltaic.weights.precision.Precision.parse). A packed folder has its own; another is an error
    vision_dtype  the same for the vision tower (no mapping); None: as dtype where that is bf16 or f32, else "bf16"
    activations   "int8": what meets an int8 or int4 matrix is rounded to int8 first, which makes the products several
                  times as fast, and what meets a bf16 matrix to bfloat16 where the CPU multiplies that faster (as
                  transformers does in that dtype); "float32": nothing is, the most accurate and slower way
    device        "cpu"; "cuda", an NVIDIA GPU (needs torch; it computes in bfloat16, or float32 where dtype is "f32",
                  and never rounds activations to int8); or "reference": the numpy definition of every operator, slow
    threads       None: the physical cores this process may use
    kv_dtype      how keys and values are stored: "bf16", "f32", or "int8" (groups of 64 numbers with a float16 scale:
                  half the memory of bf16, somewhat less exact; CPU only); None: "f32" where dtype is, else "bf16"
    memory        of a packed folder: "map" uses the file in place, shared with other processes and loaded on demand
                  (the file must not be shortened meanwhile); "copy" reads the decoder into memory of its own, in huge
                  pages: a token takes some percent less time where the system keeps files in small pages only (Linux
                  before 6.16, ext4), and starting takes longer
    verify        of a packed folder: compare the checksum of every tensor, the vision tower's before the first picture
    context       tokens that prompt and answer together may have; that memory for weights, state and K/V of one such
                  sequence is there is checked before anything is loaded. None: the model's own limit, not checked
    cache_bytes   memory for the prefix cache, pictures included; 0 turns it off; None: a quarter of the memory that is
                  free after loading
    cache_folder  takes the checkpoints that the cache drops and, when the process ends, those it holds; may be used
                  again by later processes. None: they are gone
    cache_folder_bytes  disk space for cache_folder; None: a quarter of what is free on its disk
    speculate     draft tokens and verify several at once; what is generated stays the same, token for token. "mtp":
                  drafts of the checkpoint's MTP layer; "lookup": what followed the last tokens when they were there
                  before; "auto": whichever promises more by what is measured while it runs, or none; "off"
    screen        beside a head in bf16, f32 or int8, keep a sketch of it in 4.4 bits per number, which tells which few
                  rows a token may be chosen from: only these are then read in full, and a token takes up to a quarter
                  less time. With top_k or at temperature 0; the tokens are the same, but for a probability below
                  1e-9 for each (proof: csrc/cpu/screen.cpp). CPU only, not with an int4 head, which is as
                  short; made before the second token is computed
    progress      True or False shows or hides progress bars on stderr; None: shown on a terminal

    Raises ArgumentError, DeviceError, ConfigError or CheckpointError.
    """
    from .model.config_file import load_config
    from .model.state import State
    from .weights.hub import find_model
    from .weights.packed import PACKED_FILE
    from .weights.precision import Precision

    choice("speculate", speculate, MODES)
    wanted = Precision.parse("bf16" if dtype is None else dtype, vision_dtype, activations)
    if kv_dtype is not None:
        choice("kv_dtype", kv_dtype, tuple(KV_DTYPES))
    choice("memory", memory, MEMORY)
    ops = op_set(device)
    if kv_dtype is not None and kv_dtype not in kv_dtypes(ops):
        others = " or ".join(map(repr, kv_dtypes(ops)))
        raise DeviceError(f"kv_dtype: {kv_dtype!r} is not available with device={device!r}; use {others}")
    threads = use_threads(ops, threads)
    if not isinstance(screen, bool):
        raise ArgumentError(f"screen: expected True or False, found {describe(screen)}")
    for name, value in (("cache_bytes", cache_bytes), ("cache_folder_bytes", cache_folder_bytes)):
        if value is not None:
            integer(name, value, 0, 2**62)
    if cache_folder is not None and not isinstance(cache_folder, (str, Path)):
        raise ArgumentError(f"cache_folder: expected a str or a path, found {describe(cache_folder)}")
    folder = find_model(path_or_id)
    config = load_config(folder)
    if context is not None:
        integer("context", context, 1, config.text.max_position_embeddings)

    def blank_state(fingerprint: str, weight_bytes: int, precision: Precision, has_mtp: bool) -> State:
        if speculate == "mtp" and not has_mtp:
            raise CheckpointError(f"speculate: {folder} holds {NO_MTP}")
        kv = kv_dtype or ("f32" if precision.default == "f32" else "bf16")
        mtp = has_mtp and speculate in ("auto", "mtp")
        state = State(config.text, ops, kv, context=context, fingerprint=fingerprint, mtp=mtp)
        if context is not None:
            if screen and hasattr(ops, "screen") and (precision.default != "int4" or precision.rules):
                weight_bytes += config.text.vocab_size * config.text.hidden_size * 35 // 64
            check_context(ops, weight_bytes, state, context)
        return state

    if (folder / PACKED_FILE).exists():
        explicit = wanted if dtype is not None or vision_dtype is not None else None
        parts = _map(folder, config, ops, explicit, activations, memory, verify, progress, blank_state)
    else:
        parts = _pack(folder, config, ops, wanted, progress, blank_state)
    text, vision, mtp, precision, blank = parts
    if screen and hasattr(ops, "screen") and text.weights.head.nbytes >= SCREENED_BYTES:
        text.screen_wanted = True
    cache_bytes = default_cache_bytes(ops, blank, context) if cache_bytes is None else cache_bytes
    spill = None
    if cache_folder is not None:
        from .generate.spill import SpillFolder

        spill = SpillFolder(cache_folder, blank, ops, cache_folder_bytes)
    return Model(
        folder, config, text, vision, ops, blank, device=device, precision=precision, threads=threads,
        cache_bytes=cache_bytes, spill=spill, mtp=mtp, speculate=speculate,
    )  # fmt: skip


# How the parts of a model reach `load`: what states look like is made, and memory checked, before weights are read.
BlankState = Callable[[str, int, "Precision", bool], "State"]
Parts = tuple["TextModel", "VisionModel | None", "MtpModel | None", "Precision", "State"]


def _pack(
    folder: Path,
    config: ModelConfig,
    ops: ModuleType,
    precision: Precision,
    progress: bool | None,
    blank_state: BlankState,
) -> Parts:
    """The parts of a checkpoint, packed in memory."""
    from .model.text import TextModel
    from .model.vision import VisionModel
    from .weights.build import open_source, text_weights, vision_weights
    from .weights.checkpoint import open_checkpoint
    from .weights.fingerprint import model_fingerprint

    with open_checkpoint(folder) as checkpoint:
        source = open_source(checkpoint, config, ops, precision)
        nbytes = checkpoint_bytes(checkpoint, precision.default)
        blank = blank_state(model_fingerprint(checkpoint, config, precision), nbytes, precision, source.has_mtp)
        _require_memory(ops, nbytes)
        text = TextModel(config.text, _placed(ops, text_weights(source, config, progress), precision), ops)
        mtp = _mtp(text, source, config, ops, precision, blank, progress)
        vision = None
        if config.vision is not None:
            vision_parts = _placed(ops, vision_weights(source, config, progress), precision)
            vision = VisionModel(config.vision, vision_parts, ops)
    return text, vision, mtp, precision, blank


def _map(
    folder: Path,
    config: ModelConfig,
    ops: ModuleType,
    wanted: Precision | None,
    activations: str,
    memory: str,
    verify: bool,
    progress: bool | None,
    blank_state: BlankState,
) -> Parts:
    """The parts of a packed folder. Of the vision tower no byte is read before the first picture."""
    from dataclasses import replace

    from .weights.fingerprint import packed_fingerprint
    from .weights.packed import PackedFile

    with PackedFile(folder) as packed:
        precision = replace(packed.precision, activations=activations)
        if wanted is not None and not wanted.same_formats(precision):
            raise ArgumentError(
                f"dtype: {folder} is packed as {precision} (vision {precision.vision}), asked for is {wanted} (vision "
                f"{wanted.vision}); load it without dtype, or pack the original checkpoint again"
            )
        blank = blank_state(packed_fingerprint(packed, config, precision), packed.nbytes, precision, packed.has_mtp)
        if memory == "copy":
            packed.copy(None)

        def check() -> None:
            packed.verify(ops, None, "the text model", progress)
            if blank.with_mtp:
                packed.verify(ops, ("mtp.",), "the MTP layer", progress)

        with _beside(check if verify else None):  # on one thread Python makes the objects, all others read
            from .model.text import TextModel
            from .model.vision import VisionModel
            from .weights.build import open_source, text_weights, vision_weights

            _require_memory(ops, packed.nbytes)
            source = open_source(packed, config, ops, precision)
            text = TextModel(config.text, _placed(ops, text_weights(source, config), precision), ops)
            mtp = _mtp(text, source, config, ops, precision, blank, False)
            vision = None
            if config.vision is not None:

                def check_vision() -> None:
                    packed.verify(ops, ("visual.",), "the vision tower", False)

                vision_parts = _placed(ops, vision_weights(source, config), precision)
                vision = VisionModel(config.vision, vision_parts, ops, check_vision if verify else None)
    return text, vision, mtp, precision, blank


@contextmanager
def _beside(function: Callable[[], None] | None) -> Iterator[None]:
    """Runs `function` in a thread of its own while the block runs, and ends with both; what it raises counts more than
    what the block raises."""
    if function is None:
        yield
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="deltaic-beside", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread to be had
        run()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()
        if errors:
            raise errors[0]


def _mtp(
    text: TextModel,
    source: Source,
    config: ModelConfig,
    ops: ModuleType,
    precision: Precision,
    blank: State,
    progress: bool | None,
) -> MtpModel | None:
    """The MTP layer, if it is wanted and there."""
    if not blank.with_mtp:
        return None
    from .model.mtp import MtpModel
    from .weights.build import mtp_weights

    return MtpModel(text, _placed(ops, mtp_weights(source, config, progress), precision))


def _placed(ops: ModuleType, weights: Any, precision: Precision) -> Any:
    """The weights where the op set computes: an op set on a device moves vectors there too."""
    place = getattr(ops, "place", None)
    return weights if place is None else place(weights, precision.default)


def _require_memory(ops: ModuleType, nbytes: float) -> None:
    """DeviceError, before anything is loaded, if an op set on a device lacks the memory for `nbytes` of weights."""
    require = getattr(ops, "require_memory", None)
    if require is not None:
        require(int(nbytes))
