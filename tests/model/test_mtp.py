"""The MTP layer against another one, written from the specification in double precision, and its entries in a state."""

from __future__ import annotations

from itertools import pairwise

import deltaic
import numpy as np
import pytest
from cases import seen_of
from deltaic.model.choice import Choosing, Seen, choice_of
from deltaic.model.state import BLOCK_TOKENS
from deltaic.ops import reference
from deltaic.ops.layout import new_seen, row_bounds
from safetensors.numpy import load_file
from steps import further
from tiny import picture

TOLERANCE = 1e-4  # float32, largest difference over largest value
EPS = 1e-6


def zrms(x, w):
    return (1 + w) * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Expected:
    """Spec section 13 for one sequence: every entry attends to those before it."""

    def __init__(self, folder, config):
        tensors = load_file(folder / "model.safetensors")
        self.w = {n.removeprefix("mtp."): t.astype(np.float64) for n, t in tensors.items() if n.startswith("mtp.")}
        self.embed = tensors["model.language_model.embed_tokens.weight"].astype(np.float64)
        self.config = config

    def __call__(self, h, x, positions):
        """h, x [T, H], positions [T, 3] -> (m [T, H], keys and values [Hkv, T, D])."""
        w, layer = self.w, "layers.0."
        pairs = [zrms(x, w["pre_fc_norm_embedding.weight"]), zrms(h, w["pre_fc_norm_hidden.weight"])]
        y = np.concatenate(pairs, axis=1) @ w["fc.weight"].T
        attended, keys, values = self.attention(zrms(y, w[layer + "input_layernorm.weight"]), positions)
        y = y + attended
        y = y + self.ffn(zrms(y, w[layer + "post_attention_layernorm.weight"]))
        return zrms(y, w["norm.weight"]), keys, values

    def attention(self, x, positions):
        c, T = self.config, len(x)
        a = {n.split(".")[3]: t for n, t in self.w.items() if ".self_attn." in n}
        q, gate = np.split((x @ a["q_proj"].T).reshape(T, c.num_attention_heads, -1), 2, axis=2)
        k = (x @ a["k_proj"].T).reshape(T, c.num_key_value_heads, -1)
        v = (x @ a["v_proj"].T).reshape(T, c.num_key_value_heads, -1)
        q, k = (self.rotate(zrms(t, a[n]), positions) for t, n in ((q, "q_norm"), (k, "k_norm")))
        out = np.zeros_like(q)
        group = c.num_attention_heads // c.num_key_value_heads
        for t in range(T):
            for head in range(c.num_attention_heads):
                seen = k[: t + 1, head // group] @ q[t, head] / np.sqrt(c.head_dim)
                out[t, head] = softmax(seen) @ v[: t + 1, head // group]
        return (out * sigmoid(gate)).reshape(T, -1) @ a["o_proj"].T, k.swapaxes(0, 1), v.swapaxes(0, 1)

    def rotate(self, x, positions):
        rope = self.config.rope
        n = rope.rotary_dim // 2
        y = x.copy()
        for f in range(n):
            axis = f % 3 if f % 3 and f < 3 * rope.mrope_section[f % 3] else 0
            angle = (positions[:, axis] * rope.theta ** (-2 * f / rope.rotary_dim))[:, None]
            y[..., f] = x[..., f] * np.cos(angle) - x[..., f + n] * np.sin(angle)
            y[..., f + n] = x[..., f + n] * np.cos(angle) + x[..., f] * np.sin(angle)
        return y

    def ffn(self, x):
        m = {n.removeprefix("layers.0.mlp."): t for n, t in self.w.items() if ".mlp." in n}

        def swiglu(x, gate, up, down):
            g = x @ gate.T
            return (g * sigmoid(g) * (x @ up.T)) @ down.T

        def named(prefix):
            return [m[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down")]

        if "gate.weight" not in m:
            return swiglu(x, *named(""))
        y = sigmoid(x @ m["shared_expert_gate.weight"].T) * swiglu(x, *named("shared_expert."))
        for t, p in enumerate(softmax(x @ m["gate.weight"].T)):
            top = np.argsort(-p)[: self.config.num_experts_per_tok]
            for e in top:
                gate, up = np.split(m["experts.gate_up_proj"][e], 2)
                y[t] += p[e] / p[top].sum() * swiglu(x[t], gate, up, m["experts.down_proj"][e])
        return y


@pytest.fixture
def model(tiny_mtp_folder, device):
    model = deltaic.load(tiny_mtp_folder, device=device, dtype="f32", threads=1, cache_bytes=64 << 20)
    model.__dict__["end_ids"] = frozenset()
    return model


@pytest.fixture
def expected(tiny_mtp_folder, model):
    return Expected(tiny_mtp_folder, model.config.text)


def run(model, prompt, **options):
    """(result, the state that the generation leaves behind)."""
    stream = model._start(prompt, None, None, None, options)
    return stream.finish(), stream.reading.kept[-1].state


def error(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def entries(state):
    """Keys and values [Hkv, n, D] of the MTP layer's entries."""
    rows = np.concatenate([block[0] for block in state.mtp.blocks], axis=2)[:, :, : state.mtp_length]
    return rows[0], rows[1]


def hidden_rows(model, prompt):
    """h [T, H] after the final norm and embeddings [T, H] of a prompt (pictures included), from a plain reading."""
    runner, state, rows, embeddings = model._runner, model.new_state(), [], []
    embed = runner.text.embed

    def kept(ids):
        embeddings.append(embed(ids))  # pictures are put into it afterwards
        return embeddings[-1]

    runner.text.embed = kept
    try:
        rows += runner.hidden(prompt, state, [len(prompt)])
    finally:
        del runner.text.embed
    return runner.mtp._final_norm(np.concatenate(rows)), np.concatenate(embeddings)


def test_the_layer_is_that_of_the_specification(model, expected, rng):
    """Read at once, and the last rows few at a time."""
    mtp, T, read = model._runner.mtp, BLOCK_TOKENS + 9, 100
    hidden = rng.normal(size=(T, 64)).astype(np.float32)
    ids = rng.integers(0, len(expected.embed), T)
    positions = rng.integers(0, 500, (T, 3))
    positions[read:] = np.arange(read, T)[:, None]
    m, keys, values = expected(mtp._final_norm(hidden), expected.embed[ids], positions)
    logits = m @ expected.embed.T
    embed = model._runner.text.embed
    for cuts in ([read, T], [read, read + 1, read + 5, T]):
        state = model.new_state()
        mtp.read(hidden[: cuts[0]], embed(ids[: cuts[0]]), positions[: cuts[0]], state, 0)
        for a, b in pairwise(cuts):
            found = mtp.extend(hidden[a:b], [ids[a:b].tolist()], [state], [a])
            assert error(found, m[a:b]) < TOLERANCE
            assert error(mtp.logits(found), logits[a:b]) < TOLERANCE
        assert error(entries(state)[0], keys) < TOLERANCE
        assert error(entries(state)[1], values) < TOLERANCE


def test_sequences_share_a_step_and_drafts_do_not_last(model, expected, rng):
    mtp, lengths = model._runner.mtp, (3, 1, 6)
    states = [model.new_state() for _ in lengths]
    cuts = np.cumsum([0, *lengths])
    hidden = rng.normal(size=(cuts[-1], 64)).astype(np.float32)
    ids = rng.integers(0, len(expected.embed), cuts[-1])
    m = mtp.extend(hidden, [ids[a:b].tolist() for a, b in pairwise(cuts)], states, [0, 0, 0])
    choosing = Choosing(choice_of(0.0, 0, 1.0, 0.0, 0.0, 0.0, 1.0, 200, (3, 7)), np.zeros(9, np.int64))
    for depth in (3, 1, 3):  # drafts are overwritten by others
        drafts, last = mtp.draft(m[cuts[1:] - 1], states, choosing, depth)
    h, x = mtp._final_norm(hidden), expected.embed[ids]
    for b, n in enumerate(lengths):
        rows, guessed = slice(cuts[b], cuts[b + 1]), []
        found = m[cuts[b + 1] - 1 : cuts[b + 1]]
        for depth in range(3):
            logits = mtp.logits(found[-1:])[0, :200]
            logits[[3, 7]] = -np.inf
            guessed.append(int(logits.argmax()))
            whole = expected(
                np.concatenate([h[rows], found]),
                np.concatenate([x[rows], expected.embed[guessed]]),
                np.repeat(np.arange(n + depth + 1)[:, None], 3, axis=1),
            )[0]
            found = np.concatenate([found, whole[-1:].astype(np.float32)])
        assert drafts[b] == guessed
        assert error(last[b : b + 1], found[2:3]) < TOLERANCE
        assert error(m[rows], whole[:n]) < TOLERANCE
        assert (states[b].mtp_first, states[b].mtp_length) == (0, n)


@pytest.mark.parametrize("penalties", [(0.0, 0.0, 1.0), (0.3, 0.1, 1.1)], ids=["plain", "penalties"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chooses", [False, True])
def test_drafts_made_at_once_are_those_made_one_by_one(model, rng, temperature, chooses, penalties):
    """And the step that verifies them in the same replay is the step by itself, with logits or with what follows."""
    mtp, text, limit, unused = model._runner.mtp, model._runner.text, 200, (3, 90)
    choice = choice_of(temperature, 7, 0.9, 0.0, *penalties, limit, unused)
    prompt, said = rng.integers(0, limit, 20), []
    seen = Seen(new_seen(limit, prompt)) if penalties[2] != 1 else None

    def choosing(draws):
        return Choosing(choice, draws, [seen] if seen else [])

    def expected_token(logits, draw, drafts):
        """By the definition, from all that has been said."""
        text_now, tokens = seen_of(limit, np.array([*said, *drafts]), prompt), np.empty(1, np.int64)
        choice.choose(
            reference, logits[None].copy(), np.array([draw]), tokens, [text_now] if seen else [], row_bounds(1),
            np.zeros(1, np.int64),
        )  # fmt: skip
        return int(tokens[0])

    one, other = model.new_state(), model.new_state()
    for n, depth in ((3, 1), (1, 4), (2, 3), (40, 2), (1, 4)):
        hidden = rng.normal(size=(n, 64)).astype(np.float32)
        ids, first = rng.integers(0, 250, n).tolist(), one.mtp_length
        for state in (one, other):  # with so many tokens, of which the first are all the same
            state.reserve(first + n)
            state.length = first + n
        draws = rng.integers(0, 2**53, 1 + depth)
        c = text.config
        traces = [np.zeros((c.num_delta_layers, depth + 1, c.delta_trace_width), np.float32) for _ in range(2)]
        said += (brought := rng.integers(0, limit, 1 + n % 5).tolist())
        if seen:
            seen.said += brought
        drafts, found_hidden, found_logits, found_tokens = mtp.draft_at_once(
            hidden, ids, one, first, choosing(draws), depth, traces[0] if n < 40 else None, chooses=chooses
        )
        m, expected = mtp.extend(hidden, [ids], [other], [first])[-1:], []
        for ahead in range(depth):
            if ahead:
                m = further(mtp, m, expected[-1], other, ahead - 1)
            expected.append(expected_token(mtp.logits(m)[0], draws[ahead], expected))
        assert drafts == expected
        assert [x is None for x in (found_hidden, found_logits, found_tokens)] == [
            n == 40,
            n == 40 or chooses,
            n == 40 or not chooses,
        ]
        if n < 40:
            plain_hidden, logits, _ = text.step([[ids[-1], *drafts]], [other], traces[1], head=True)
            if chooses:
                rows = text.step([[ids[-1], *drafts]], [other], traces[1], choosing=choosing(draws))
                np.testing.assert_array_equal(rows[0], plain_hidden)
                follow = [expected_token(logits[r], draws[r], drafts[:r]) for r in range(1 + depth)]
                assert found_tokens == rows[2] == follow
            pairs = [(found_hidden, plain_hidden), (traces[0], traces[1])]
            pairs += [] if chooses else [(found_logits, logits)]
            for found, plain in pairs:
                if text.ops.SPLIT_INVARIANT:
                    np.testing.assert_array_equal(found, plain)
                else:
                    assert error(found, plain) < TOLERANCE
        assert one.mtp_length == other.mtp_length == first + n
        np.testing.assert_array_equal(entries(one), entries(other))


@pytest.mark.parametrize("mode", ["auto", "mtp"])
@pytest.mark.parametrize("seen", [False, True])
def test_entries_are_those_of_a_new_reading(model, expected, mode, seen):
    """After generation with drafts, right and wrong ones: what the checkpoint holds is what the layer makes of the
    whole sequence at once; entry t at the position of token t, placeholders embedded as what is seen."""
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    model._runner.fixed_depth = 3
    images = [picture()] if seen else None
    prompt = model.prepare(messages, images=images)
    result, state = run(model, prompt, max_new_tokens=40, speculate=mode)
    ids, new = np.concatenate([prompt.token_ids, result.token_ids[:-1]]), result.completion_tokens - 1
    assert state.token_ids == ids.tolist()
    assert (state.mtp_first, state.mtp_length) == (0, len(ids) - 1)
    assert result.drafted > result.accepted

    more = np.repeat((len(prompt) + state.rope_delta + np.arange(new))[:, None], 3, axis=1)
    positions = np.concatenate([prompt.position_ids, more])
    whole = type(prompt)(**{n: getattr(prompt, n) for n in prompt.__dataclass_fields__} | {
        "token_ids": ids, "position_ids": positions})  # fmt: skip
    h, x = hidden_rows(model, whole)
    if seen:
        assert np.abs(x - expected.embed[ids]).max() > 0.1  # the pictures are in it
    _, keys, values = expected(h[:-1].astype(np.float64), x[1:].astype(np.float64), positions[:-1])
    assert error(entries(state)[0], keys) < TOLERANCE
    assert error(entries(state)[1], values) < TOLERANCE


def test_forks_share_entries_until_one_is_written(model, rng):
    mtp = model._runner.mtp

    def feed(state, n, seed):
        rng = np.random.default_rng(seed)
        hidden, ids = rng.normal(size=(n, 64)).astype(np.float32), rng.integers(0, 250, n).tolist()
        mtp.extend(hidden, [ids], [state], [state.mtp_length])

    state, lone = model.new_state(), model.new_state()
    feed(state, 150, 1), feed(lone, 150, 1)
    twin = state.fork()
    assert [id(b) for b in twin.mtp.blocks] == [id(b) for b in state.mtp.blocks]
    before = [block.copy() for block in state.mtp.blocks]
    feed(twin, 20, 2)
    np.testing.assert_array_equal(state.mtp.blocks, before)
    feed(state, 20, 3), feed(lone, 20, 3)
    np.testing.assert_array_equal(entries(state), entries(lone))
    assert twin.mtp.blocks[0] is state.mtp.blocks[0]
    assert state.nbytes == sum(b.nbytes for b in (state.conv, state.delta, *state.kv.blocks, *state.mtp.blocks))


def test_entries_are_saved(model, tmp_path):
    _, state = run(model, "the cat sat", max_new_tokens=5, speculate="mtp")
    state.save(tmp_path / "state")
    loaded = deltaic.State.load(tmp_path / "state", model._ops)
    assert (loaded.mtp_first, loaded.mtp_length) == (state.mtp_first, state.mtp_length)
    np.testing.assert_array_equal(entries(loaded), entries(state))


def test_a_gap_starts_the_entries_anew(model):
    """A state that was fed without the layer, and drafts that begin later: the entries begin where they can."""
    text = model.prepare("the cat sat on the mat").token_ids.tolist()
    off, state = run(model, text, max_new_tokens=9, speculate="off")
    assert state.mtp_length == 0
    ids = [*text, *off.token_ids]
    on, state = run(model, ids, max_new_tokens=9, speculate="mtp")
    assert on.cached_tokens == len(ids) - 1
    assert state.mtp_first == len(ids) - 2  # the first entry that can be made, with the hidden row of the checkpoint
    assert state.mtp_first + state.mtp_length == len(ids) + on.completion_tokens - 2
    assert on.token_ids == run(model, ids, max_new_tokens=9, speculate="off")[0].token_ids
