"""How does text become token ids and back? The checkpoint's tokenizer.json, and a detokeniser for one token at a
time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, ConfigError, PromptError
from ..fileio import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from .prepared import Prepared

_MOST_KNOWN = 1 << 16  # tokens whose bytes streams remember: those that are said are few


def symbol_bytes() -> dict[str, int]:
    """GPT-2's table of printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest for
    U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


class Tokenizer:
    """Byte-level BPE of a checkpoint. Special tokens written in a text are recognised as such, as transformers does:
    text from strangers that must not contain them has to be cleaned by the caller."""

    def __init__(self, backend: Backend | Prepared, eos_token: str | None = None) -> None:
        """backend: a `tokenizers.Tokenizer` with a byte-level decoder (else ConfigError), or the prepared vocabulary of
        a packed folder. eos_token: text of the end token, if any."""
        from .prepared import Prepared

        self._prepared = backend if isinstance(backend, Prepared) else None
        self._library = None if isinstance(backend, Prepared) else self._checked_library(backend)
        self._special = (
            self._prepared.special
            if self._prepared
            else frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)
        )
        self.eos_token_id = None if eos_token is None else self.id_of(eos_token)

    @staticmethod
    def _checked_library(backend: Backend) -> Backend:
        from tokenizers.decoders import ByteLevel

        if not isinstance(backend.decoder, ByteLevel):
            found = type(backend.decoder).__name__
            raise ConfigError(
                f"tokenizer: expected a ByteLevel decoder, found {found}; only byte-level vocabularies are supported"
            )
        backend.no_truncation()
        backend.no_padding()
        if not backend.get_vocab_size(with_added_tokens=True):
            raise ConfigError("tokenizer: expected a vocabulary, found no tokens")
        return backend

    @property
    def backend(self) -> Backend:
        """The `tokenizers.Tokenizer`; AttributeError with a prepared vocabulary, which does without."""
        if self._library is None:
            raise AttributeError("backend: the vocabulary was prepared, the tokenizers library has not read it")
        return self._library

    @classmethod
    def from_folder(cls, folder: str | Path, *, prepared: bool = True) -> Tokenizer:
        """Read `tokenizer.json` (and the end token from `tokenizer_config.json`, if there). prepared: use what
        `deltaic quantize` prepared of it, where that is there. Raises ConfigError."""
        from .prepared import read_prepared

        folder = Path(folder)
        ready = read_prepared(folder) if prepared else None
        if ready is not None:
            return cls(ready, _eos_token(folder / "tokenizer_config.json"))
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path}: expected the tokenizer's file, found none; fetch it from the model's page into this folder"
            )
        try:
            backend = Backend.from_file(str(path))
        except BaseException as error:  # malformed rules can panic in the library, which is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(
                f"{path}: expected a tokenizers file, found one that does not load ({error}); fetch it again"
            ) from error
        try:
            return cls(backend, _eos_token(folder / "tokenizer_config.json"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @cached_property
    def _holes(self) -> tuple[int, tuple[int, ...]]:
        """(one more than the largest id with a token, ids below without one)."""
        if self._prepared is not None:
            return self._prepared.count, self._prepared.unused
        count = self.backend.get_vocab_size(with_added_tokens=True)
        if None not in map(self.backend.id_to_token, range(count)):
            return count, ()  # so many tokens for so many ids: there are no others
        ids = frozenset(self.backend.get_vocab(with_added_tokens=True).values())
        return max(ids) + 1, tuple(i for i in range(max(ids)) if i not in ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token: ids from here on must never be sampled (the model's table
        may be larger)."""
        return self._holes[0]

    @property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids below `vocab_size` without a token. Empty for the family's own vocabularies."""
        return self._holes[1]

    def id_of(self, token: str) -> int | None:
        """Id of a whole token as written in the vocabulary (for example "<|im_end|>"), or None."""
        if self._prepared is None:
            return self.backend.token_to_id(token)
        added = self._prepared.added_id(token)
        if added is not None:
            return added
        try:
            return self._prepared.id_of_bytes(bytes([self._bytes[character] for character in token]))
        except KeyError:
            return None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is put before or after. Raises PromptError if it is not a str or holds a lone
        surrogate."""
        if not isinstance(text, str):
            raise PromptError(f"text: expected a str, found {type(text).__name__}")
        try:
            if self._prepared is not None:
                return self._prepared.encode(text)
            return self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:  # the library's answer to a str that is not valid Unicode
            place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            raise PromptError(
                f"text: expected valid Unicode, found a lone surrogate at character {place}; "
                "decode the input with errors='replace'"
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Ids without a token give nothing; incomplete UTF-8 gives U+FFFD. skip_special: leave out
        control tokens (tool-call and think tags are not among them). Raises ArgumentError for ids that are not whole
        numbers from 0."""
        if self._prepared is not None:
            return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")
        return self.backend.decode([_checked(i) for i in ids], skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """UTF-8 bytes (perhaps a part of a character) that `token_id` adds to the text."""
        token_id = _checked(token_id)
        if self._prepared is not None:
            return b"" if skip_special and token_id in self._special else self._prepared.bytes_of(token_id) or b""
        token = self.backend.id_to_token(token_id)
        if token is None or (skip_special and token_id in self._special):
            return b""
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # an added token with characters outside the byte table is written as it is
            return token.encode("utf-8")

    def stream(self, skip_special: bool = True) -> DetokenizeStream:
        """A fresh detokeniser for one sequence."""
        return DetokenizeStream(self, skip_special)

    @cached_property
    def known_bytes(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """`token_bytes` of ids that streams have seen, by `skip_special`."""
        return {}, {}

    @cached_property
    def _bytes(self) -> dict[str, int]:
        return symbol_bytes()


class DetokenizeStream:
    """Text of a sequence, token by token, at a cost per token that does not grow with the sequence.

    What `push` returns is final: bytes that may still become a character are held back. All pieces and `flush`
    together are what `Tokenizer.decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._known = tokenizer.known_bytes[skip_special]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty in the middle of a character."""
        data = self._known.get(token_id) if type(token_id) is int else None  # True and 1.0 are no ids, and equal 1
        if data is None:
            data = self._tokenizer.token_bytes(token_id, self._skip_special)
            if len(self._known) < _MOST_KNOWN:
                self._known[token_id] = data
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end (U+FFFD for an unfinished character). The stream may then be used for another
        sequence."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _checked(token_id: Any) -> int:
    if not hasattr(token_id, "__index__") or isinstance(token_id, bool) or not 0 <= token_id < 1 << 32:
        raise ArgumentError(f"token id: expected a whole number from 0 to 2^32 - 1, found {token_id!r}")
    return int(token_id)


def _eos_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    token = read_json_object(path).get("eos_token")
    if isinstance(token, dict):  # older files write tokens as objects
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise ConfigError(f"{path}: eos_token: expected a token's text, found {token!r}")
    return token
