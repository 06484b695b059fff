"""How is a tokeniser there at once? A packed folder holds its vocabulary and merges as arrays beside tokenizer.json, of
which only the rules (how text is normalised and cut into pieces) are read again. Reading a tokenizer.json of a quarter
of a million words takes most of a second and 200 MB; this takes milliseconds."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, ConfigError, DeltaicError
from ..ops.bpe import merge_key, merge_slots

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

PREPARED_FILE = "deltaic.tokenizer"
FORMAT_VERSION = "1"

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype(np.uint8), "I64": np.dtype(np.int64)}
_RULES = ("normalizer", "pre_tokenizer")
_PLAIN_MODEL = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
_PLAIN_ADDED = ("single_word", "lstrip", "rstrip")
_TRIALS = 200


class Prepared:
    """The vocabulary of a prepared file: what `Tokenizer` asks of it."""

    def __init__(self, arrays: dict[str, np.ndarray[Any, Any]], facts: dict[str, Any]):
        from tokenizers import Tokenizer as Library

        rules = Library.from_str(json.dumps(facts["rules"]))
        self._normalizer, self._pre_tokenizer = rules.normalizer, rules.pre_tokenizer
        self._added: dict[str, int] = facts["added"]
        self._bytes, self._offsets = arrays["bytes"], arrays["offsets"]
        self.special = frozenset(facts["special"])
        self.unused = tuple(facts["unused"])
        self.count = len(self._offsets) - 1
        self._symbol_ids = arrays["symbol_ids"]
        self._merges = arrays["slots"], arrays["pairs"], arrays["merged"]
        # added tokens are looked for in the text as it is or, those that say so, in the normalised text
        late = set(facts["normalized"])
        self._raw_split = _splitter({text: i for text, i in self._added.items() if i not in late})
        self._late = {self._normalized(text): i for text, i in self._added.items() if i in late}
        self._late_split = _splitter(self._late)
        self._all: dict[bytes, int] | None = None

    def bytes_of(self, token_id: int) -> bytes | None:
        """UTF-8 bytes (perhaps a part of a character) of a token, or None."""
        if not 0 <= token_id < self.count or token_id in self.unused:
            return None
        begin, end = self._offsets[token_id : token_id + 2].tolist()
        return self._bytes[begin:end].tobytes()

    def id_of_bytes(self, token: bytes) -> int | None:
        """Id of a token that is not an added one."""
        if self._all is None:
            added = frozenset(self._added.values())
            texts = ((self.bytes_of(i), i) for i in range(self.count) if i not in added)
            self._all = {text: i for text, i in texts if text is not None}
        return self._all.get(token)

    def added_id(self, token: str) -> int | None:
        """Id of an added token, as written."""
        return self._added.get(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises TypeError or UnicodeEncodeError if it is not valid Unicode."""
        ids: list[int] = []
        for i, part in enumerate(self._raw_split(text)):
            if i % 2:
                ids.append(self._added[part])
                continue
            for j, piece in enumerate(self._late_split(self._normalized(part))):
                if j % 2:
                    ids.append(self._late[piece])
                elif piece:
                    ids += self._encode_plain(piece)
        return ids

    def _normalized(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def _encode_plain(self, text: str) -> list[int]:
        from ..ops import cpu

        pieces = [piece for piece, _ in self._pre_tokenizer.pre_tokenize_str(text)]
        codes = np.frombuffer("".join(pieces).encode("utf-16-le"), np.uint16)
        begins = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)), out=begins[1:])
        merged: list[int] = cpu.bpe_merge(self._symbol_ids[codes], begins, *self._merges).tolist()
        return merged


def _splitter(tokens: Iterable[str]) -> Callable[[str], list[str]]:
    """Cuts a text at `tokens`, the longest first: every second part is one of them."""
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return lambda text: [text]
    split: Callable[[str], list[str]] = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
    return split


def read_prepared(folder: Path) -> Prepared | None:
    """The prepared vocabulary of a folder; None where there is none for this tokenizer.json or this installation.

    Raises ConfigError if the file is damaged.
    """
    path, source = folder / PREPARED_FILE, folder / "tokenizer.json"
    if not path.is_file() or not source.is_file():
        return None
    try:
        from ..ops import cpu  # noqa: F401
    except ImportError:
        return None
    from ..weights.checkpoint import CheckpointFile

    try:
        file = CheckpointFile(path, _DTYPES)
        try:
            facts = json.loads(file.metadata["facts"])
            if facts["version"] != FORMAT_VERSION or facts["source"] != _source(source):
                return None  # of another release, or the tokeniser has been replaced since
            arrays = {name: tensor.read() for name, tensor in file.tensors.items()}
        finally:
            file.close()
        if _checksum(arrays) != facts["checksum"]:
            raise ValueError("its contents do not match their checksum")
        return Prepared(arrays, facts)
    except (OSError, CheckpointError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected what `deltaic quantize` writes, found a damaged file ({error}); remove it, or pack the "
            "original checkpoint again"
        ) from error


def _source(path: Path) -> list[int]:
    """Which tokenizer.json this is: its size and checksum."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return [len(data), zlib.crc32(data)]


def _checksum(arrays: dict[str, np.ndarray[Any, Any]]) -> int:
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].data.cast("B"), zlib.crc32(name.encode(), value))
    return value


# -------------------------------------------------------------------------------------------------------------- writing


def write_prepared(folder: Path) -> bool:
    """Prepare the tokenizer.json of a folder. False, and nothing is written, where there is none that can be read
    (whoever needs it reports that), for a tokeniser that is not plain byte-pair encoding, or if the prepared one does
    not encode like the library."""
    from safetensors.numpy import save

    from .tokenizer import Tokenizer, symbol_bytes

    path, source = folder / PREPARED_FILE, folder / "tokenizer.json"
    if not source.is_file():
        return False
    try:
        tokenizer = Tokenizer.from_folder(folder, prepared=False)
    except DeltaicError:
        return False
    raw = json.loads(source.read_bytes())
    model, added = raw["model"], raw.get("added_tokens") or []
    plain = model.get("type", "BPE") == "BPE" and isinstance(model.get("vocab"), dict) and raw.get("pre_tokenizer")
    if not plain or not all(model.get(name) in allowed for name, allowed in _PLAIN_MODEL.items()):
        return False
    if any(token.get(name) for token in added for name in _PLAIN_ADDED):
        return False
    vocab: dict[str, int] = model["vocab"]
    symbols = symbol_bytes()
    if not all(symbol in vocab for symbol in symbols):
        return False
    symbol_ids = np.full(max(map(ord, symbols)) + 1, -1, np.int64)
    for symbol in symbols:
        symbol_ids[ord(symbol)] = vocab[symbol]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    table = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in merges], np.int64).reshape(-1, 3)
    pairs = merge_key(table[:, 0], table[:, 1])
    if len(np.unique(pairs)) < len(pairs):
        return False
    # the library may number added tokens anew
    id_of = {token["content"]: tokenizer.backend.token_to_id(token["content"]) for token in added}
    unused = set(tokenizer.unused_ids)
    texts = [b"" if i in unused else tokenizer.token_bytes(i, skip_special=False) for i in range(tokenizer.vocab_size)]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "bytes": np.frombuffer(b"".join(texts), np.uint8),
        "offsets": np.cumsum([0, *map(len, texts)], dtype=np.int64),
        "symbol_ids": symbol_ids,
        "slots": merge_slots(pairs),
        "pairs": pairs,
        "merged": np.ascontiguousarray(table[:, 2]),
    }
    facts = {
        "version": FORMAT_VERSION,
        "source": _source(source),
        "checksum": _checksum(arrays),
        "rules": {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": {}, "merges": []},
            **{name: raw.get(name) for name in _RULES},
        },
        "added": id_of,
        "special": [id_of[token["content"]] for token in added if token.get("special")],
        "normalized": [id_of[token["content"]] for token in added if token.get("normalized")],
        "unused": sorted(unused),
    }
    if not _encodes_alike(Prepared(arrays, facts), tokenizer):
        return False
    temporary = path.with_suffix(".partial")
    try:
        temporary.write_bytes(save(arrays, {"facts": json.dumps(facts)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _encodes_alike(prepared: Prepared, tokenizer: Tokenizer) -> bool:
    """Compared on texts made of the tokens themselves and of random characters."""
    draw = random.Random(0)
    for _ in range(_TRIALS):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(20)]
        noise = "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x20, 0x3000)))) for _ in range(20))
        text = tokenizer.decode(ids, skip_special=False) + noise
        if prepared.encode(text) != tokenizer.encode(text):
            return False
    return True
