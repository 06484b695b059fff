"""A prepared tokeniser gives what the library gives, and is left alone where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import small_backend
from deltaic.chat.prepared import PREPARED_FILE, read_prepared, write_prepared
from deltaic.chat.tokenizer import Tokenizer
from deltaic.errors import ConfigError, PromptError
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS

pytest.importorskip("deltaic._core")


def folder_with(path: Path, change: Any = None) -> Path:
    """A folder with the small tokeniser; `change` gets the contents of its tokenizer.json."""
    content = json.loads(small_backend().to_str())
    assert {token["normalized"] for token in content["added_tokens"]} == {False, True}  # as the family's
    if change is not None:
        change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = folder_with(tmp_path_factory.mktemp("prepared"))
    assert write_prepared(folder)
    prepared, library = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder, prepared=False)
    assert not hasattr(prepared, "backend")
    return prepared, library


_TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["the", " of", "picture", "née", "日本", "<|im_end|>", "<think>", "a b→c", "e\u0301"]),
    )
).map("".join)


@settings(deadline=None)  # the machine may be busy
@given(_TEXT)
def test_encodes_and_decodes_like_the_library(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    prepared, library = both
    ids = library.encode(text)
    assert prepared.encode(text) == ids
    for skip_special in (True, False):
        assert prepared.decode(ids, skip_special) == library.decode(ids, skip_special)
        assert [prepared.token_bytes(i, skip_special) for i in ids] == [
            library.token_bytes(i, skip_special) for i in ids
        ]


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40), st.booleans())
def test_decodes_any_ids_like_the_library(
    both: tuple[Tokenizer, Tokenizer], ids: list[int], skip_special: bool
) -> None:
    prepared, library = both
    assert prepared.decode(ids, skip_special) == library.decode(ids, skip_special)


def test_knows_what_the_library_knows(both: tuple[Tokenizer, Tokenizer]) -> None:
    prepared, library = both
    assert prepared.vocab_size == library.vocab_size
    assert prepared.unused_ids == library.unused_ids == ()
    assert prepared.eos_token_id == library.eos_token_id is not None
    for token in ("<|im_end|>", "<think>", "the", "Ġof", "a b→c", "nothing such", "\u2603", ""):
        assert prepared.id_of(token) == library.id_of(token), token
    with pytest.raises(PromptError, match="lone surrogate at character 1"):
        prepared.encode("a\ud800")


def test_a_vocabulary_of_the_family(tmp_path: Path, family_tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(family_tokenizer.backend.to_str())
    assert write_prepared(tmp_path)
    prepared = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert prepared.encode(text) == family_tokenizer.encode(text)


def test_ids_without_a_token_stay_unused(tmp_path: Path) -> None:
    def leave_a_hole(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["the"] = 1000

    folder = folder_with(tmp_path, leave_a_hole)
    library = Tokenizer.from_folder(folder)
    assert library.unused_ids
    assert write_prepared(folder)
    prepared = Tokenizer.from_folder(folder)
    assert (prepared.vocab_size, prepared.unused_ids) == (library.vocab_size, library.unused_ids)
    assert prepared.token_bytes(library.unused_ids[0]) == b""
    assert prepared.encode("the <think>") == library.encode("the <think>")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(byte_fallback=True),
        lambda content: content["model"].update(dropout=0.5),
        lambda content: content["added_tokens"][0].update(lstrip=True),
        lambda content: content.update(pre_tokenizer=None),
    ],
)
def test_what_is_not_plain_is_left_to_the_library(tmp_path: Path, change: Any) -> None:
    folder = folder_with(tmp_path, change)
    assert not write_prepared(folder)
    assert not (folder / PREPARED_FILE).exists()


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert not write_prepared(tmp_path)
    assert read_prepared(tmp_path) is None


def test_a_replaced_tokenizer_counts(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    assert write_prepared(folder)
    assert read_prepared(folder) is not None
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert read_prepared(folder) is None
    assert Tokenizer.from_folder(folder).encode("the")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:-9] + b"x" + raw[-8:], lambda raw: b"1234"])
def test_a_damaged_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    folder = folder_with(tmp_path)
    assert write_prepared(folder)
    path = folder / PREPARED_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match="remove it, or pack the original checkpoint again"):
        Tokenizer.from_folder(folder)
