"""The verify step of the delta rule in the emulator: rows against old states, accepted ones applied afterwards, with
the bits of decoding one by one."""

from __future__ import annotations

import numpy as np
import pytest
from cases import gated_delta_net_commit, side_by_side
from deltaic.errors import ArgumentError
from deltaic.ops import cuda, reference
from helpers import array, assert_close, normal, reference_weight, tensor
from test_mixers import delta_case

LAYERS = 2


def layers_of(rng, lengths, **sizes):
    """Cases of LAYERS layers that share the batch, and their states [L, ...] per sequence."""
    layers = [delta_case(rng, lengths, "f32", **sizes) for _ in range(LAYERS)]
    return layers, *side_by_side(layers)


def width(layer):
    Hk, Dk, (Hv, _, Dv) = layer["num_k_heads"], layer["head_k_dim"], layer["states"][0].shape
    return 3 * Hk * Dk + 2 * Hv * Dv + Hv


def verified(layers, conv, states):
    trace = tensor(np.full((LAYERS, layers[0]["proj"].shape[0], width(layers[0])), np.nan, np.float32))
    outputs = []
    for i, layer in enumerate(layers):
        case = layer | {"conv_states": [c[i] for c in conv], "states": [s[i] for s in states]}
        outputs.append(array(cuda.gated_delta_net(**dict(case, proj=tensor(layer["proj"])), trace=trace[i])))
    return outputs, trace


@pytest.mark.parametrize(
    ("lengths", "counts", "sizes"),
    [
        ([3], [2], {}),
        ([2, 0, 5], [0, 0, 5], {}),
        ([17, 1], [17, 1], {"Hk": 1, "Hv": 3, "Dk": 40, "Dv": 7}),
        ([4], [3], {"Hk": 1, "Hv": 2, "Dk": 128, "Dv": 128}),
    ],
)
def test_verify_and_commit_equal_plain_decoding(device, rng, lengths, counts, sizes):
    layers, conv, states = layers_of(rng, lengths, **sizes)
    on = [tensor(x) for x in conv], [tensor(x) for x in states]
    outputs, trace = verified(layers, *on)
    for before, after in zip([*conv, *states], [*on[0], *on[1]], strict=True):
        np.testing.assert_array_equal(array(after), before, err_msg="a verify step wrote to a state")
    plain = [tensor(x) for x in conv], [tensor(x) for x in states]
    gated_delta_net_commit(cuda, layers, trace, counts, *on)
    for i, layer in enumerate(layers):
        for b, n in enumerate(counts):
            first = layer["cu_seqlens"][b]
            for t in range(first, first + n):
                part = dict(
                    layer, proj=tensor(layer["proj"][t : t + 1]), cu_seqlens=np.array([0, 1]),
                    conv_states=[plain[0][b][i]], states=[plain[1][b][i]],
                )  # fmt: skip
                np.testing.assert_array_equal(array(cuda.gated_delta_net(**part))[0], outputs[i][t])
    for found, wanted in zip([*on[0], *on[1]], [*plain[0], *plain[1]], strict=True):
        np.testing.assert_array_equal(array(found), array(wanted))


def test_verify_matches_the_reference(device, rng):
    layers, conv, states = layers_of(rng, [3, 0, 5, 1])
    on = [tensor(x) for x in conv], [tensor(x) for x in states]
    outputs, trace = verified(layers, *on)
    wanted = np.empty(tuple(trace.shape), np.float32)
    for i, layer in enumerate(layers):
        case = layer | {"conv_states": [c[i] for c in conv], "states": [s[i] for s in states]}
        assert_close(outputs[i], reference.gated_delta_net(**case, trace=wanted[i]), "f32", factor=4)
    assert_close(trace, wanted, "f32", factor=4)
    gated_delta_net_commit(reference, layers, wanted, [2, 0, 5, 0], conv, states)
    gated_delta_net_commit(cuda, layers, trace, [2, 0, 5, 0], *on)
    for found, expected in zip([*on[0], *on[1]], [*conv, *states], strict=True):
        assert_close(found, expected, "f32", factor=4)


def test_what_does_not_fit_is_refused(device, rng):
    layers, conv, states = layers_of(rng, [65])
    with pytest.raises(ArgumentError, match="at most 64 rows"):
        verified(layers, [tensor(x) for x in conv], [tensor(x) for x in states])
    layers, conv, states = layers_of(rng, [3, 2])
    on = [tensor(x) for x in conv], [tensor(x) for x in states]
    _, trace = verified(layers, *on)
    for counts in ([-1, 0], [4, 0], [0, 3]):
        with pytest.raises(ArgumentError, match="counts"):
            gated_delta_net_commit(cuda, layers, trace, counts, *on)
    with pytest.raises(ArgumentError, match="trace is"):
        gated_delta_net_commit(cuda, layers, trace[:, :, :-1].contiguous(), [1, 1], *on)


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_the_first_rows_of_a_matrix_are_a_view(device, rng, format):
    x, whole = normal(rng, 2, 40), cuda.pack([normal(rng, 100, 40)], format)
    for rows in (1, 16, 50, 200):
        part = cuda.first_rows(whole, rows)
        assert part.shape == (min(rows, 100), 40)
        y = cuda.linear(tensor(x), part)
        np.testing.assert_array_equal(array(y), array(cuda.linear(tensor(x), whole))[:, :rows])
        assert part.parts[0].q.data_ptr() == whole.parts[0].q.data_ptr()
    assert reference_weight(part).matrix.shape == (100, 40)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_wide_rows_are_staged_in_pieces(device, rng, tokens):
    """More columns than shared memory takes at once: every number of rows adds in the same order."""
    K = 9000
    w, x, norm = cuda.pack([normal(rng, 3, K)], "int8"), normal(rng, 8, K), normal(rng, K, scale=0.1)
    y = cuda.linear(tensor(x[:tokens]), w, norm=norm)
    assert_close(y, reference.linear(x[:tokens], reference_weight(w), norm=norm), "f32", factor=4)
    np.testing.assert_array_equal(array(y)[0], array(cuda.linear(tensor(x[:1]), w, norm=norm))[0])
