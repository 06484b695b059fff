"""Tokenizer: encoding, decoding, one token at a time, and broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import small_backend
from deltaic.chat.tokenizer import Tokenizer
from deltaic.errors import ArgumentError, ConfigError, PromptError
from hypothesis import given, settings
from hypothesis import strategies as st

_SMALL = Tokenizer(small_backend())
TEXTS = [
    "",
    "the picture of",
    "née 日本 👍🏽 ﬁ",
    "a b→c",
    "e\u0301",
    "<|im_start|>x<|im_end|><think>",
    " \n\t ",
    "0123",
    "\u200d👩‍👩‍👧",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(small_tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text)


def test_special_tokens_in_text_are_honoured(small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("hi<|im_end|>")
    assert ids[-1] == small_tokenizer.id_of("<|im_end|>")
    assert small_tokenizer.decode(ids) == "hi"
    assert small_tokenizer.decode(ids, skip_special=False) == "hi<|im_end|>"
    think = small_tokenizer.encode("<think>")
    assert think == [small_tokenizer.id_of("<think>")]
    assert small_tokenizer.decode(think) == "<think>"  # an added token, but not a special one


def test_equals_transformers(family_tokenizer: Tokenizer, reference_processor: Any) -> None:
    reference = reference_processor.tokenizer
    for text in [*TEXTS, "l'été don't 12345 नमस्ते\r\n\r\n  x", "<tool_call>\n{}\n</tool_call><|endoftext|>"]:
        ids = family_tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert family_tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert family_tokenizer.decode(ids, False) == reference.decode(ids, skip_special_tokens=False)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(0, _SMALL.vocab_size + 5), max_size=40), st.booleans())
def test_stream_equals_decode(ids: list[int], skip_special: bool) -> None:
    stream = _SMALL.stream(skip_special)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == _SMALL.decode(ids, skip_special)


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=30))
def test_stream_never_emits_half_a_character(text: str) -> None:
    ids = _SMALL.encode(text)
    whole = _SMALL.decode(ids, skip_special=False)
    stream = _SMALL.stream(skip_special=False)
    emitted = ""
    for i in ids:
        emitted += stream.push(i)
        assert whole.startswith(emitted)
    assert emitted == whole
    assert stream.flush() == ""


def test_stream_holds_back_and_flushes(small_tokenizer: Tokenizer) -> None:
    bytes_of_thumb = small_tokenizer.encode("👎")  # not a word: four byte tokens
    assert len(bytes_of_thumb) >= 2
    stream = small_tokenizer.stream()
    assert [stream.push(i) for i in bytes_of_thumb] == [""] * (len(bytes_of_thumb) - 1) + ["👎"]
    assert stream.push(bytes_of_thumb[0]) == ""
    assert stream.push(small_tokenizer.encode("x")[0]) == "\ufffdx"  # it cannot complete any more
    assert stream.push(bytes_of_thumb[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(small_tokenizer.encode("y")[0]) + stream.flush() == "y"


def test_stream_equals_decode_with_the_family_vocabulary(family_tokenizer: Tokenizer) -> None:
    import random

    generator = random.Random(3)
    for _ in range(200):
        ids = [generator.randrange(family_tokenizer.vocab_size) for _ in range(60)]
        stream = family_tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == family_tokenizer.decode(ids)


def test_vocabulary_size_and_holes() -> None:
    assert _SMALL.vocab_size == len(small_backend().get_vocab())
    assert _SMALL.unused_ids == ()
    assert _SMALL.id_of("<no such token>") is None
    assert _SMALL.decode([_SMALL.vocab_size, 2**31]) == ""


@pytest.mark.parametrize("bad", [-1, 1.0, 1.5, "3", True, None, 2**40])
def test_decode_refuses_what_is_no_id(bad: Any) -> None:
    _SMALL.stream().push(1)  # which True and 1.0 are equal to
    with pytest.raises(ArgumentError, match="token id"):
        _SMALL.decode([bad])
    with pytest.raises(ArgumentError, match="token id"):
        _SMALL.stream().push(bad)


def test_encode_refuses_lone_surrogates_and_other_types() -> None:
    with pytest.raises(PromptError, match="surrogate at character 2"):
        _SMALL.encode("ab\ud800")
    with pytest.raises(PromptError, match="expected a str, found bytes"):
        _SMALL.encode(b"ab")  # type: ignore[arg-type]


def test_folder(tmp_path: Path) -> None:
    backend = small_backend()
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_id is None
    assert len(tokenizer.encode("zzzzzzzz")) == 8
    for form in ("<|im_end|>", {"content": "<|im_end|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form}))
        assert Tokenizer.from_folder(tmp_path).eos_token_id == tokenizer.id_of("<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 3}')
    with pytest.raises(ConfigError, match="eos_token"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[]",
        "\xff",
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        '{"model": {"type": "X"}}',
    ],
)
def test_broken_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_missing_file_and_foreign_decoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found none"):
        Tokenizer.from_folder(tmp_path)
    backend = small_backend()
    from tokenizers.decoders import Metaspace

    backend.decoder = Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="ByteLevel decoder, found Metaspace"):
        Tokenizer.from_folder(tmp_path)
