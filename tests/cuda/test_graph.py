"""A tape on the GPU repeats captured calls on other inputs, with one buffer sent before and one read after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import PLAIN_CHOICE, side_by_side
from deltaic.errors import ArgumentError
from deltaic.ops import cuda
from deltaic.ops.cuda_tape import FEWEST_BLOCKS
from helpers import array, normal, tensor
from test_mixers import attention_case, delta_case

PLAIN = PLAIN_CHOICE | {"temperature": 0.0}


def record(inputs, work):
    """A tape of work(*inputs), and its first results."""
    tape = cuda.Tape()
    return tape, tape.record(inputs, work)


@pytest.mark.parametrize("shape", [(3, 40), (1, 7), (2, 4100), (0, 8)])
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_rows_come_and_go(device, rng, shape, kind):
    """Whatever their size and alignment; several of each; and results are the caller's own."""
    weight = tensor(normal(rng, shape[1]))

    def work(x, y):
        return cuda.rms_norm(x, weight, 1e-6), cuda.rms_norm_pair(x, weight, y, weight, 1e-6)

    whole = [tensor(normal(rng, shape[0] + 1, shape[1]), kind) for _ in range(6)]
    rows = [x[1:] for x in whole]
    tape, found = record(rows[:2], work)
    kept = []
    for given in (rows[:2], rows[2:4], rows[4:], rows[:2]):
        for result, wanted in zip(found, work(*given), strict=True):
            np.testing.assert_array_equal(array(result), array(wanted))
        kept.append((found, [array(result).copy() for result in found]))
        found = tape.replay(rows[2 * len(kept) : 2 * len(kept) + 2] if len(kept) < 3 else rows[:2])
    for results, contents in kept:
        for result, content in zip(results, contents, strict=True):
            np.testing.assert_array_equal(array(result), content)


def test_numbers_and_tokens(device, rng):
    """Numbers of the host are those of the replay; tokens come back as numbers, and may be used on the way."""
    table, head = (cuda.pack([normal(rng, 50, 16)], "f32") for _ in range(2))
    unused = np.array([3, 49])

    def work(numbers, draws):
        for i in (1, 2, 3):
            logits = cuda.linear(cuda.embed(numbers[i - 1 : i], table), head)
            cuda.sample_rows(
                logits, **PLAIN | {"temperature": 1.0, "unused": unused}, limit=50, draws=draws[i - 1 : i],
                tokens=numbers[i : i + 1],
            )  # fmt: skip
        return numbers[1:3], cuda.embed(numbers[:4], table), numbers[3:4]

    def expected(first, draws):
        ids = np.array([first, 0, 0, 0, 0])
        work(ids, draws)  # one by one, the tokens read back each time
        return ids

    tape = None
    for first in (7, 20, 7, 49):
        draws, numbers = rng.integers(0, 2**53, 3), np.array([first, 0, 0, 0, 99])
        if tape is None:
            tape, found = record([numbers, draws], work)
        else:
            found = tape.replay([numbers, draws])
        ids = expected(first, draws)
        assert [*found[0].tolist(), *found[2].tolist()] == ids[1:4].tolist()
        assert found[0].dtype == np.int64
        np.testing.assert_array_equal(array(found[1]), array(cuda.embed(ids[:4], table)))


def test_states_are_those_of_the_replay(device, rng):
    """Two ragged sequences: a verified step and its commit, whose traces, states and counts are elsewhere each time."""
    layers, conv, delta = [delta_case(rng, [2, 3], "f32") for _ in range(2)], None, None
    conv, delta = side_by_side(layers)
    given = [tensor(layer["proj"]) for layer in layers]
    C, (Hv, Dk, Dv), Hk = conv[0].shape[2], delta[0].shape[1:], layers[0]["num_k_heads"]
    width, bounds = C + Hk * Dk + Hv * Dv + Hv, np.array([0, 2, 5])

    def work(bounds, counts, conv, delta, traces):
        outputs = []
        for i, layer in enumerate(layers):
            case = layer | {"proj": given[i], "cu_seqlens": bounds, "trace": traces[0][i]}
            case |= {"conv_states": [c[i] for c in conv], "states": [d[i] for d in delta]}
            outputs.append(cuda.gated_delta_net(**case))
        cuda.gated_delta_net_commit(
            traces[0], num_k_heads=Hk, cu_seqlens=bounds, counts=counts, conv_states=conv, states=delta
        )
        return tuple(outputs)

    tape = None
    for counts in ([2, 1], [0, 3], [1, 0]):
        scale = 1 + sum(counts)
        fresh = [[tensor(x * scale) for x in conv], [tensor(x * scale) for x in delta]]
        plain = [[tensor(x * scale) for x in conv], [tensor(x * scale) for x in delta]]
        traces = [[tensor(np.full((2, 5, width), np.nan, np.float32))] for _ in range(2)]
        inputs = [bounds, np.array(counts), *fresh, traces[0]]
        if tape is None:
            tape, found = record(inputs, work)
        else:
            found = tape.replay(inputs)
        wanted = work(bounds, np.array(counts), *plain, traces[1])
        pairs = [*zip(found, wanted, strict=True), (traces[0][0], traces[1][0])]
        pairs += [pair for a, b in zip(fresh, plain, strict=True) for pair in zip(a, b, strict=True)]
        for result, expected in pairs:
            np.testing.assert_array_equal(array(result), array(expected))


def test_tables_are_those_of_the_replay(device, rng, monkeypatch):
    """Ragged sequences whose blocks are elsewhere each time, and more or fewer of them."""
    monkeypatch.setattr(cuda, "SPLITS", 4)
    norms, tape = [normal(rng, 16) for _ in range(2)], None
    for starts in ([5, 0], [0, 40], [5, 0]):
        case, _, tables = attention_case(rng, [1, 2], starts, "f32", "bf16")
        case |= {"q_norm": norms[0], "k_norm": norms[1], "proj": tensor(case["proj"])}
        twins = [cuda.BlockTable() for _ in tables]
        for table, twin in zip(tables, twins, strict=True):
            for block in table.blocks:
                twin.append(block.clone())
        names = ("proj", "cos", "sin", "cu_seqlens", "starts")

        def work(*given, rest=case, names=names):
            return (cuda.gated_attention(**rest | dict(zip((*names, "tables"), given, strict=True))),)

        inputs = [*(case[name] for name in names), tables]
        if tape is None:
            tape, (found,) = record(inputs, work)
        else:
            (found,) = tape.replay(inputs)
        np.testing.assert_array_equal(array(found), array(cuda.gated_attention(**case, tables=twins)))
        for table, twin in zip(tables, twins, strict=True):
            for block, expected in zip(table.blocks, twin.blocks, strict=True):
                np.testing.assert_array_equal(array(block), array(expected))


def test_rooms_are_doubled(device):
    tables = [cuda.BlockTable(), cuda.BlockTable()]
    found = set()
    for n in range(1, 4 * FEWEST_BLOCKS + 2):
        tables[1].append(tensor(np.zeros((1, 2, 1, 1, 1), np.float32)))
        tables[0] = tables[0] if len(tables[0]) else tables[1]
        (room, dtype), *others = cuda.Tape.shape([np.zeros(3), tables, [], None, tensor(np.zeros(2, np.float32))])
        assert n <= room <= max(FEWEST_BLOCKS, 2 * n - 1)
        assert (dtype, others) == (torch.float32, [])
        found.add(room)
    assert len(found) == 4
    blocks = [block.data_ptr() for block in tables[1].blocks]
    assert tables[1].addresses.tolist() == blocks


def test_what_does_not_fit_is_refused(device, rng):
    weight = tensor(np.zeros(8, np.float32))
    state = tensor(np.zeros((2, 3, 4), np.float32))
    tape, _ = record([tensor(normal(rng, 2, 8)), [state]], lambda x, states: (cuda.rms_norm(x, weight, 1e-6),))
    shown = r"an input is torch.float32\[\d, 8\], expected a contiguous torch.float32\[2, 8\]"
    for rows in (tensor(normal(rng, 3, 8)), tensor(normal(rng, 2, 16))[:, ::2]):
        with pytest.raises(ArgumentError, match=shown):
            tape.replay([rows, [state]])
    with pytest.raises(ArgumentError, match=r"an array of a state is \[3, 4\], expected \[2, 3, 4\]"):
        tape.replay([tensor(normal(rng, 2, 8)), [state[0]]])


def test_rows_that_no_token_can_be_chosen_from(device, rng):
    def work(logits, numbers):
        cuda.sample_rows(logits, **PLAIN, limit=20, draws=numbers[:2], tokens=numbers[2:])
        return (numbers[2:],)

    good, bad = normal(rng, 2, 20), normal(rng, 2, 20)
    bad[1, 4] = np.nan
    tape, (chosen,) = record([tensor(bad), np.zeros(4, np.int64)], work)
    assert chosen.tolist() == [bad[0].argmax(), -1]
    assert tape.replay([tensor(bad), np.zeros(4, np.int64)])[0].tolist() == [bad[0].argmax(), -1]
    assert tape.replay([tensor(good), np.zeros(4, np.int64)])[0].tolist() == good.argmax(1).tolist()


def test_constants_live_as_long_as_the_tape(device, rng):
    """Numbers of the host that a launch reads, however many others have been uploaded since."""
    x, tape = tensor(normal(rng, 2, 20)), None
    numbers, unused = np.array([0, 0]), np.array([int(array(x)[0].argmax())])

    def work(logits, numbers):
        mine = cuda.rms_norm(logits, np.zeros(20, np.float32), 1e-6)
        zeros = np.zeros(2, np.int64)
        cuda.sample_rows(mine, **PLAIN | {"unused": unused}, limit=20, draws=zeros, tokens=numbers)
        return (numbers,)

    tape, (first,) = record([x, numbers], work)
    for i in range(40):
        cuda.sample_rows(
            tensor(normal(rng, 1, 9)), **PLAIN | {"unused": np.array([i % 9])}, limit=9, draws=np.array([i]),
            tokens=np.zeros(1, np.int64),
        )  # fmt: skip
    (again,) = tape.replay([x, numbers])
    assert again.tolist() == first.tolist()
    assert first[0] != unused[0]
