"""The text model against transformers, and against itself: split, stepped, batched. Once per op set."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from deltaic.errors import ArgumentError, ContextLengthError, StateError
from deltaic.model.rope import TextRope
from deltaic.model.state import State
from deltaic.model.text import Mark, TextModel
from deltaic.ops import reference
from deltaic.ops.layout import new_seen
from oracle import TEXT_MODELS, build_text, feed, max_error, text_positions

TOLERANCE = 1e-4  # float32, largest difference over largest value
BF16_TOLERANCE = 2e-2

torch_model = functools.cache(lambda name: oracle.torch_text_model(TEXT_MODELS[name]))
rounded_torch_model = functools.cache(lambda name: oracle.rounded(torch_model(name)))


@functools.cache
def model_of(name, ops, dtype="f32"):
    return build_text(torch_model(name), ops, dtype)


def random_ids(rng, n):
    return rng.integers(0, 97, n)


def assert_same_state(a, b, tolerance=TOLERANCE):
    assert a.length == b.length
    assert max_error(a.delta, b.delta) < tolerance
    assert max_error(a.conv, b.conv) < tolerance
    if a.kv_dtype == "f32":
        for x, y in zip(a.kv.blocks, b.kv.blocks, strict=True):
            assert max_error(x, y) < tolerance


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_logits_match_transformers(ops, rng, name, length):
    model, ids = model_of(name, ops), random_ids(rng, length)
    logits = feed(model, State(model.config, ops), ids)
    assert max_error(logits, oracle.torch_logits(torch_model(name), ids)) < TOLERANCE


def test_a_thousand_tokens_match_transformers(ops, rng):
    model, ids = model_of("odd_heads", ops), random_ids(rng, 1000)
    logits = feed(model, State(model.config, ops), ids)
    assert max_error(logits, oracle.torch_logits(torch_model("odd_heads"), ids)) < TOLERANCE


@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_three_axis_positions_match_transformers(ops, rng, name):
    """Any positions on the three axes, as pictures give them; causality stays by place in the sequence."""
    model, ids = model_of(name, ops), random_ids(rng, 20)
    positions = rng.integers(0, 4000, (20, 3))
    state = State(model.config, ops)
    logits = model.logits(model.forward(model.embed(ids), positions, [state], np.array([0, 20])))
    position_ids = torch.from_numpy(positions.T.copy())[:, None]
    assert max_error(logits, oracle.torch_logits(torch_model(name), ids, position_ids=position_ids)) < TOLERANCE


@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_decoding_equals_one_shot(ops, rng, name):
    model, ids = model_of(name, ops), random_ids(rng, 24)
    whole, steps = State(model.config, ops), State(model.config, ops)
    expected = feed(model, whole, ids)
    parts = [feed(model, steps, ids[:9])] + [feed(model, steps, ids[t : t + 1]) for t in range(9, 24)]
    assert max_error(np.concatenate(parts), expected) < TOLERANCE
    assert_same_state(steps, whole)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("name", ["odd_heads", "moe"])
def test_prompt_split_anywhere(ops, rng, name, cut):
    model, ids = model_of(name, ops), random_ids(rng, 130)
    whole, split = State(model.config, ops), State(model.config, ops)
    expected = feed(model, whole, ids)
    parts = [feed(model, split, ids[:cut]), feed(model, split, ids[cut:])]
    assert max_error(np.concatenate(parts), expected) < TOLERANCE
    assert_same_state(split, whole)


@pytest.mark.parametrize("name", ["odd_heads", "moe"])
def test_ragged_batch_equals_each_alone(ops, rng, name):
    """A decoding sequence, a fresh prompt and a continued one share a pass; an empty one rides along."""
    model = model_of(name, ops)
    before, now = [130, 0, 7, 3], [1, 66, 5, 0]
    prompts = [random_ids(rng, b + n) for b, n in zip(before, now, strict=True)]
    alone, batched = ([State(model.config, ops) for _ in prompts] for _ in range(2))
    expected = []
    for ids, b, one, other in zip(prompts, before, alone, batched, strict=True):
        for state in (one, other):
            if b:
                feed(model, state, ids[:b])
        expected.append(feed(model, one, ids[b:]))
    x = model.embed(np.concatenate([ids[b:] for ids, b in zip(prompts, before, strict=True)]))
    positions = np.concatenate([text_positions(b, n) for b, n in zip(before, now, strict=True)])
    cu_seqlens = np.concatenate([[0], np.cumsum(now)])
    logits = model.logits(model.forward(x, positions, batched, cu_seqlens))
    assert max_error(logits, np.concatenate(expected)) < TOLERANCE
    for a, b in zip(batched, alone, strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_bfloat16_weights(ops, rng, name):
    """Close to the model as it was; and exactly the model whose weights are rounded, since activations stay float32."""
    ids = random_ids(rng, 60)
    model = model_of(name, ops, "bf16")
    logits = feed(model, State(model.config, ops), ids)
    assert max_error(logits, oracle.torch_logits(torch_model(name), ids)) < BF16_TOLERANCE
    assert max_error(logits, oracle.torch_logits(rounded_torch_model(name), ids)) < TOLERANCE


def test_bfloat16_kv_stays_close_and_consistent(ops, rng):
    model, ids = model_of("odd_heads", ops), random_ids(rng, 140)
    whole, steps = State(model.config, ops, "bf16"), State(model.config, ops, "bf16")
    logits = feed(model, whole, ids)
    assert max_error(logits, oracle.torch_logits(torch_model("odd_heads"), ids)) < BF16_TOLERANCE
    assert whole.kv.blocks[0].dtype == np.uint16
    parts = [feed(model, steps, ids[:125])] + [feed(model, steps, ids[t : t + 1]) for t in range(125, 140)]
    # A key on the border between two bfloat16 numbers may fall either way, hence not the tolerance of float32.
    assert max_error(np.concatenate(parts), logits) < BF16_TOLERANCE / 4


@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_rope_tables_match_transformers(rng, name):
    hf, rope = torch_model(name), model_of(name, reference).rope
    positions = rng.integers(0, 4096, (50, 3))
    positions[0] = 262143
    expected = hf.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions.T.copy())[:, None])
    half = expected[0].shape[-1] // 2
    for found, table in zip(rope(positions), expected, strict=True):
        # float32 frequencies agree to a rounding, which a far position multiplies
        np.testing.assert_allclose(found[1:], table[0, 1:, :half].numpy(), atol=5e-4)
        np.testing.assert_allclose(found[0], table[0, 0, :half].numpy(), atol=4e-2)


def test_whole_model_in_float64(rng):
    """The reference op set is an executable specification: in double precision, chunks do not matter at all."""
    model, ids = model_of("moe", reference), random_ids(rng, 30)

    def run(cuts):
        state = State(model.config, reference)
        state.conv, state.delta = state.conv.astype(np.float64), state.delta.astype(np.float64)
        parts = []
        for a, b in pairwise(cuts):
            x = model.embed(ids[a:b]).astype(np.float64)
            parts.append(model.forward(x, text_positions(a, b - a), [state], np.array([0, b - a])))
        return np.concatenate(parts)

    hidden = run([0, 30])
    assert hidden.dtype == np.float64
    assert max_error(run([0, 1, 17, 30]), hidden) < 1e-12
    logits = model.logits(hidden)
    assert max_error(logits, oracle.torch_logits(torch_model("moe"), ids)) < TOLERANCE


def test_arguments_that_do_not_fit_are_errors(ops, rng):
    model = model_of("dense", ops)
    state, other = State(model.config, ops), State(model.config, ops)
    x, positions = model.embed(random_ids(rng, 4)), text_positions(0, 4)

    def forward(x=x, positions=positions, states=(state,), cu_seqlens=(0, 4), marks=()):
        return model.forward(x, positions, list(states), np.array(cu_seqlens), marks=marks)

    with pytest.raises(ArgumentError, match=r"\(4, 2\)"):
        forward(positions=positions[:, :2])
    with pytest.raises(ArgumentError, match=r"expected \[T, 42\]"):
        forward(x=x[:, :3])
    for bad in [(0, 3), (1, 4), (0, 5, 4), (0, 4, 4), (4,)]:
        with pytest.raises(ArgumentError, match="cu_seqlens"):
            forward(cu_seqlens=bad)
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        forward(states=(state, other), cu_seqlens=(0, 5, 4))
    for rows in [(0,), (4,), (2, 2), (3, 1), (-1,)]:
        with pytest.raises(ArgumentError, match="marks"):
            forward(marks=[Mark(n, None, None) for n in rows])
    with pytest.raises(ArgumentError, match="marks"):
        forward(states=(state, other), cu_seqlens=(0, 2, 4), marks=[Mark(1, None, None)])
    with pytest.raises(StateError, match="twice"):
        forward(states=(state, state), cu_seqlens=(0, 2, 4))
    with pytest.raises(ArgumentError, match=r"token id"):
        model.embed(np.array([0, 97]))
    with pytest.raises(ArgumentError, match=r"token id"):
        model.embed(np.array([-1]))
    state.length = model.config.max_position_embeddings - 3
    with pytest.raises(ContextLengthError, match="4097"):
        forward()
    state.length = 0
    assert state.intact
    assert not state.delta.any()  # refused before anything was written
    assert forward().shape == (4, 42)


def test_an_interrupted_pass_spoils_the_state(ops, rng, monkeypatch):
    model = build_text(torch_model("dense"), ops)
    state, ids = State(model.config, ops), random_ids(rng, 3)
    with monkeypatch.context() as patch:
        patch.setattr(model.weights.layers[2], "ffn", None)
        with pytest.raises(AttributeError):
            feed(model, state, ids)
    with pytest.raises(StateError, match="interrupted"):
        feed(model, state, ids)
    assert np.isfinite(feed(model, State(model.config, ops), ids)).all()


@pytest.mark.parametrize("name", list(TEXT_MODELS))
def test_replayed_steps_are_the_calls_themselves(rng, name):
    """Steps of several sequences in turns and together, on tapes, against the layers called one by one."""
    from deltaic.ops import cpu

    model = model_of(name, cpu)
    plain = TextModel(model.config, model.weights, cpu)
    plain.replay = lambda key, rows, inputs, run: run(*inputs)
    states = {m: [State(model.config, cpu) for _ in range(3)] for m in (model, plain)}
    for members in ([0], [1], [0], [0, 1], [2, 0], [2], [1, 2], [0, 1, 2], [2, 1, 0]):
        ids = random_ids(rng, len(members))
        rows = []
        for m in (model, plain):
            chosen = [states[m][i] for i in members]
            rows.append(m.step(ids[:, None].tolist(), chosen, head=len(members) > 1))
        assert np.array_equal(rows[0][0], rows[1][0])
        assert (rows[0][1] is None) == (len(members) == 1)
        if len(members) > 1:
            assert np.array_equal(rows[0][1], rows[1][1])
            assert np.array_equal(rows[0][1], m.logits(rows[0][0]))
    for a, b in zip(states[model], states[plain], strict=True):
        assert_same_state(a, b, 1e-30)
    assert len(model.replay._tapes) >= 3


@pytest.mark.parametrize("format", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("settings", [(0.0, 0, 0.0), (1.0, 5, 0.0), (1.0, 5, 0.7), (1.0, 0, 0.0)])
def test_a_screened_head_chooses_the_same_tokens(rng, format, settings):
    """Plain steps and steps of drafts, on tapes, against the whole head; and most of the head is not read."""
    from deltaic.model.choice import Choosing, Seen, choice_of
    from deltaic.ops import cpu

    temperature, top_k, presence = settings
    V = 5000
    plain = model_of("dense", cpu)
    head = cpu.pack([rng.standard_normal((V, plain.config.hidden_size)).astype(np.float32)], format)
    weights = dataclasses.replace(plain.weights, head=head)
    whole, screened, by_hand = (TextModel(plain.config, weights, cpu) for _ in range(3))
    screened.screen_head()
    by_hand.screen_head()
    by_hand.replay, left_out = lambda key, rows, inputs, run: run(*inputs), []
    by_hand.ops = SimpleNamespace(**vars(cpu))
    by_hand.ops.linear_top = lambda *args, **kwargs: left_out.append(cpu.linear_top(*args, **kwargs)) or left_out[-1]
    choice = choice_of(temperature, top_k, 1.0, 0.0, presence, 0.0, 1.0, V - 9, (3, 7))
    models = whole, screened, by_hand
    states = [State(plain.config, cpu) for _ in models]
    texts = [[Seen(new_seen(V, np.arange(0)))] if presence else [] for _ in models]
    for rows in (1, 1, 1, 3, 1, 2):
        ids, draws = random_ids(rng, rows).tolist(), rng.integers(0, 2**53, rows)
        trace = np.zeros((plain.config.num_delta_layers, rows, plain.config.delta_trace_width), np.float32)
        chosen = []
        for model, state, seen in zip(models, states, texts, strict=True):
            if model.screen is not None:
                model.screen.history[:] = 0
            choosing = Choosing(choice, draws, seen)
            found = model.step([ids], [state], trace if rows > 1 else None, choosing=choosing)
            chosen.append(found[2])
            for text in seen:
                text.said.append(found[2][0])
        assert chosen[0] == chosen[1] == chosen[2]
    assert (len(left_out) == 6) if top_k or not temperature else not left_out
    assert not left_out or np.isinf(left_out[-2]).any()


def test_angles_of_one_text_token_are_those_of_many():
    rope = TextRope(model_of("yarn", reference).config.rope)
    together = rope(np.repeat(np.arange(1000)[:, None], 3, axis=1))
    for first, n in ((0, 1), (1, 1), (255, 1), (256, 1), (999, 1), (3, 4), (254, 3), (250, 600)):
        for few, rows in zip(rope.text([(first, n)]), together, strict=True):
            assert np.array_equal(few, rows[first : first + n])
    for found, rows in zip(rope.text([(254, 3), (7, 1)]), together, strict=True):
        assert np.array_equal(found, rows[[254, 255, 256, 7]])
