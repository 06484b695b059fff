"""Byte-pair merging: the compiled operator against its definition, and against the library."""

from __future__ import annotations

import time

import numpy as np
import pytest
from deltaic.errors import ArgumentError
from deltaic.ops import bpe, reference


@pytest.fixture
def cpu():
    return pytest.importorskip("deltaic.ops.cpu")


def random_merges(rng, symbols, count):
    """Merges of random earlier tokens; several pairs may give the same token, as in real vocabularies."""
    texts = [chr(97 + i) for i in range(symbols)]
    token_of = {text: i for i, text in enumerate(texts)}
    rows = {}
    while len(rows) < count:
        a, b = rng.integers(0, len(texts), 2).tolist()
        text = texts[a] + texts[b]
        if (a, b) in rows or len(text) > 6:
            continue
        if text not in token_of:
            token_of[text] = len(texts)
            texts.append(text)
        rows[a, b] = token_of[text]
    table = np.array([(a, b, c) for (a, b), c in rows.items()], np.int64)
    pairs = bpe.merge_key(table[:, 0], table[:, 1])
    return texts, table, (bpe.merge_slots(pairs), pairs, np.ascontiguousarray(table[:, 2]))


def pieces(rng, symbols, count, longest=30):
    lengths = rng.integers(0, longest, count)
    return rng.integers(0, symbols, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize(("symbols", "count"), [(1, 1), (2, 20), (3, 60), (5, 300)])
def test_kernel_is_the_definition(cpu, rng, symbols, count):
    _, _, merges = random_merges(rng, symbols, count)
    for _ in range(10):
        ids, begins = pieces(rng, symbols, 20)
        assert np.array_equal(cpu.bpe_merge(ids, begins, *merges), reference.bpe_merge(ids, begins, *merges))


def test_definition_is_the_library(rng):
    from tokenizers import Tokenizer, models

    texts, table, merges = random_merges(rng, 3, 60)
    vocabulary = {text: i for i, text in enumerate(texts)}
    library = Tokenizer(models.BPE(vocabulary, [(texts[a], texts[b]) for a, b, _ in table.tolist()]))
    for _ in range(100):
        ids, begins = pieces(rng, 3, 1, 40)
        found = reference.bpe_merge(ids, begins, *merges).tolist()
        assert found == library.encode("".join(texts[i] for i in ids), add_special_tokens=False).ids


def test_nothing_to_merge(cpu):
    slots = bpe.merge_slots(np.empty(0, np.int64))
    none = np.empty(0, np.int64)
    for ids, begins in ((none, [0]), (none, [0, 0]), (np.array([4, 4]), [0, 2])):
        assert np.array_equal(cpu.bpe_merge(ids, np.array(begins, np.int64), slots, none, none), ids)


def test_a_long_piece_takes_no_quadratic_time(cpu, rng):
    _, _, merges = random_merges(rng, 2, 20)
    start = time.perf_counter()
    cpu.bpe_merge(rng.integers(0, 2, 1_000_000), np.array([0, 1_000_000]), *merges)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("ids", "begins", "message"),
    [
        ([1, 1], [0, 1], "rise from 0"),
        ([1, 1], [1, 2], "rise from 0"),
        ([1, 1], [0, 2, 1, 2], "rise from 0"),
        ([1, -1], [0, 2], "negative"),
        ([1, 1 << 40], [0, 2], "31 bits"),
    ],
)
def test_wrong_arguments(cpu, rng, ids, begins, message):
    _, _, merges = random_merges(rng, 2, 4)
    with pytest.raises(ArgumentError, match=message):
        cpu.bpe_merge(np.array(ids), np.array(begins), *merges)


def test_a_table_with_wrong_numbers_harms_nobody(cpu):
    ids, begins, one = np.array([0, 0]), np.array([0, 2]), np.array([5])
    pairs = np.array([0])
    assert cpu.bpe_merge(ids, begins, np.full(4, 99), pairs, one).tolist() == [0, 0]
    with pytest.raises(ArgumentError, match="power of two"):
        cpu.bpe_merge(ids, begins, np.zeros(3, np.int64), pairs, one)
    with pytest.raises(ArgumentError, match="merged id"):
        cpu.bpe_merge(ids, begins, np.zeros(4, np.int64), pairs, np.array([-7]))
