"""Speculation changes no token, no probability and no state; and it is used where it pays."""

from __future__ import annotations

import itertools

import deltaic
import numpy as np
import pytest
from deltaic import cli
from deltaic.errors import ArgumentError, CheckpointError
from deltaic.generate.costs import Acceptance, Costs
from deltaic.generate.lookup import LOOKUP_DEPTH, MATCHES, Lookup
from deltaic.generate.speculate import MTP_DEPTH, Speculator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

MODES = ("auto", "mtp", "lookup")
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "top_k": 6, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model(tiny_mtp_folder):
    """On the op set whose rows have the same bits in any company."""
    model = deltaic.load(tiny_mtp_folder, dtype="f32", threads=1, cache_bytes=64 << 20)
    model.__dict__["end_ids"] = frozenset()
    return model


@pytest.fixture(scope="module")
def miniature():
    return deltaic.load(cli.MINIATURE, dtype="f32", threads=1, cache_bytes=0)


@pytest.fixture(autouse=True)
def measured_depth(request):
    """No test leaves a fixed depth behind."""
    yield
    for name in ("model", "miniature"):
        if name in request.fixturenames:
            request.getfixturevalue(name)._runner.fixed_depth = None


def run(model, prompt, mode, depth=None, stop_after=None, **options):
    """(result, the state that is left behind), of all tokens or of a stream that is closed early."""
    model._runner.fixed_depth = depth
    model.cache.clear()
    options = {"speculate": mode, "max_new_tokens": 60, **options}
    stream = model._start(prompt, options.pop("images", None), None, None, options)
    for n, _ in enumerate(stream, 1):
        if n == stop_after:
            stream.close()
            break
    return stream.result, stream.reading.kept[-1].state if stream.reading.kept else None


def assert_same_state(a, b):
    assert (a.token_ids, a.length, a.rope_delta, a.images) == (b.token_ids, b.length, b.rope_delta, b.images)
    np.testing.assert_array_equal(a.delta, b.delta)
    np.testing.assert_array_equal(a.conv, b.conv)
    rows = [np.concatenate(s.kv.blocks, axis=3)[:, :, :, : s.length] for s in (a, b)]
    np.testing.assert_array_equal(*rows)


def tokens_of(result):
    return result.token_ids, result.text, result.finish_reason, result.stop_string, result.logprobs


# ------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("depth", [1, 2, 3, 4, None])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_states_and_logprobs_are_those_of_plain_decoding(model, mode, depth, options):
    for seed, prompt in enumerate([[5, 9, 5, 9, 5], "the cat sat on the mat"]):
        given = {"seed": seed, "logprobs": 3, **options}
        expected, plain = run(model, prompt, "off", **given)
        found, state = run(model, prompt, mode, depth, **given)
        assert tokens_of(found) == tokens_of(expected)
        assert_same_state(state, plain)
        assert (expected.drafted, expected.accepted) == (0, 0)
        if depth is not None and mode != "lookup":
            assert found.drafted > 0


@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    depth=st.sampled_from([1, 2, 4]),
    stop_after=st.integers(1, 40),
    seed=st.integers(0, 50),
    greedy=st.booleans(),
)
def test_a_stream_that_is_closed_anywhere_leaves_the_state_of_plain_decoding(
    model, mode, depth, stop_after, seed, greedy
):
    options = {"seed": seed, **(GREEDY if greedy else SAMPLED)}
    prompt = np.random.default_rng(seed).integers(0, 250, 6).tolist() * 2
    expected, plain = run(model, prompt, "off", stop_after=stop_after, **options)
    found, state = run(model, prompt, mode, depth, stop_after=stop_after, **options)
    assert tokens_of(found) == tokens_of(expected)
    assert_same_state(state, plain)


@pytest.mark.parametrize("mode", MODES)
def test_right_drafts_are_taken_and_wrong_ones_cost_nothing_but_time(miniature, mode):
    prompt = miniature.prepare([{"role": "user", "content": "Count from 3 to 12."}])
    expected, _ = run(miniature, prompt, "off", **GREEDY)
    assert "3, 4, 5, 6" in expected.text
    for depth in (1, 2, 3, 4):
        found, _ = run(miniature, prompt, mode, depth, **GREEDY)
        assert tokens_of(found) == tokens_of(expected)
        assert 0 < found.accepted < found.drafted
        if mode == "mtp":  # the layer is trained
            steps = found.completion_tokens - 1 - found.accepted
            assert (found.completion_tokens - 1) / steps > (1.3 if depth > 1 else 1.25)


@pytest.mark.parametrize("mode", MODES)
def test_pictures(miniature, mode):
    picture = Image.open(cli.MINIATURE / "pictures" / "two.png")
    options = {"images": [picture], "max_new_tokens": 80, **GREEDY}
    question = [{"role": "user", "content": "Describe the picture."}]
    expected, _ = run(miniature, question, "off", **options)
    found, _ = run(miniature, question, mode, 3, **options)
    assert tokens_of(found) == tokens_of(expected)
    assert found.accepted > 0 or mode == "lookup"


def test_the_reference_speculates_too(tiny_mtp_folder):
    """Its rows may differ by a rounding, which this model's choices do not notice."""
    model = deltaic.load(tiny_mtp_folder, device="reference", dtype="f32", threads=1)
    prompt = [5, 9, 5, 9, 5]
    expected = run(model, prompt, "off", max_new_tokens=12, **GREEDY)[0]
    for mode in MODES:
        assert run(model, prompt, mode, 2, max_new_tokens=12, **GREEDY)[0].token_ids == expected.token_ids


@pytest.mark.parametrize("mode", MODES)
def test_end_tokens_stop_strings_and_limits_hold_inside_a_step(model, mode, monkeypatch):
    prompt = [5, 9, 5, 9, 5]
    whole = run(model, prompt, "off", **GREEDY)[0]
    for limit in (1, 2, 3, 7):
        assert run(model, prompt, mode, 4, max_new_tokens=limit, **GREEDY)[0].token_ids == whole.token_ids[:limit]
    text = whole.text
    stop = next(text[i : i + 2] for i in range(8, len(text)) if text.find(text[i : i + 2]) == i and text[i : i + 2])
    expected, plain = run(model, prompt, "off", stop=stop, **GREEDY)
    found, state = run(model, prompt, mode, 4, stop=stop, **GREEDY)
    assert expected.stop_string == stop
    assert tokens_of(found) == tokens_of(expected)
    assert_same_state(state, plain)
    end = next(t for i, t in enumerate(whole.token_ids) if i > 4 and t not in whole.token_ids[:i])
    monkeypatch.setitem(model.__dict__, "end_ids", frozenset([end]))
    expected, plain = run(model, prompt, "off", **GREEDY)
    found, state = run(model, prompt, mode, 4, **GREEDY)
    assert expected.finish_reason == "stop"
    assert tokens_of(found) == tokens_of(expected)
    assert_same_state(state, plain)


@pytest.mark.parametrize("mode", MODES)
def test_the_context_ends_where_it_ends(tiny_mtp_folder, mode):
    model = deltaic.load(tiny_mtp_folder, dtype="f32", threads=1, context=40)
    model.__dict__["end_ids"] = frozenset()
    found = [run(model, [5, 9] * 4, m, 4, max_new_tokens=None, **GREEDY)[0] for m in ("off", mode)]
    assert found[0].completion_tokens == 32
    assert tokens_of(found[0]) == tokens_of(found[1])


def test_sampled_tokens_have_the_models_probabilities(model):
    """Chi-squared: the second of two tokens after a draft that is always verified, against the exact distribution."""
    prompt, options = [7, 3, 7, 3, 7], {"temperature": 1.0, "top_k": 4, "presence_penalty": 0.0}
    runs = 400
    model.cache.clear()
    model._runner.fixed_depth = 1
    pairs = []
    for seed in range(runs):
        result = model.generate(prompt, seed=seed, speculate="mtp", max_new_tokens=3, **options)
        pairs.append(tuple(result.token_ids[:2]))
    limit, unused = model._sampled_ids

    def distribution(ids):
        logits = model.forward(ids)[-1].astype(np.float64)
        logits[unused], logits[limit:] = -np.inf, -np.inf
        top = np.argsort(-logits)[:4]
        p = np.exp(logits[top] - logits[top[0]])
        return dict(zip(top.tolist(), p / p.sum(), strict=True))

    first = distribution(prompt)
    expected = {(a, b): p * q for a, p in first.items() for b, q in distribution([*prompt, a]).items()}
    assert set(pairs) <= set(expected)
    cells = sorted(expected, key=expected.get)
    counts = np.array([pairs.count(pair) for pair in cells], float)
    means = runs * np.array([expected[pair] for pair in cells])
    rare = np.cumsum(means) < 8  # the rarest pairs count as one
    split = [rare] + [np.arange(len(cells)) == i for i in np.flatnonzero(~rare)]
    groups = [(counts[g].sum(), means[g].sum()) for g in split if g.any()]
    chi2 = sum((n - m) ** 2 / m for n, m in groups)
    freedom = len(groups) - 1
    assert freedom >= 5
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


# ------------------------------------------------------------------------------- beside the rest


@pytest.mark.parametrize("mode", MODES)
def test_a_conversation_goes_on_without_reading_again(model, mode, tmp_path):
    expected = []
    for m in ("off", mode):
        model._runner.fixed_depth = 3
        model.cache.clear()
        session = model.session(speculate=m, max_new_tokens=20, **GREEDY)
        said = [session.say(text) for text in ("the cat?", "the dog sat", "on the mat")]
        twin = session.fork()
        said += [session.say("and?"), twin.say("what?")]
        session.save(tmp_path / "session")
        said.append(model.load_session(tmp_path / "session").say("more"))
        expected.append([(r.token_ids, r.cached_tokens, r.cache_miss_reason) for r in said])
    assert expected[0] == expected[1]


def test_a_verification_may_be_dropped_and_states_forked_in_between(model):
    runner, prompt = model._runner, model.prepare([5, 9, 5, 9, 5])

    def fresh():
        state = model.new_state()
        list(runner.hidden(prompt, state, [5]))
        return state

    state, plain = fresh(), fresh()
    rows = [runner.step(token, plain) for token in (3, 4, 5)]
    runner.verify([state], [[8, 8, 8, 8]])  # dropped
    other = fresh()
    v = runner.verify([state, other], [[3, 4, 5, 6], [1]])
    twin = state.fork()
    runner.commit(v, [3, 0])
    np.testing.assert_array_equal(v.hidden[:3], np.concatenate(rows))
    assert_same_state(state, plain)
    assert_same_state(other, fresh())
    runner.commit(runner.verify([twin], [[3, 4, 5]]), [3])
    assert_same_state(twin, plain)


def test_a_call_may_choose_its_mode(tiny_folder, tiny_mtp_folder):
    plain = deltaic.load(tiny_folder, dtype="f32", threads=1)
    assert plain.speculate == "auto"
    assert not plain.info()["mtp"]
    with pytest.raises(ArgumentError, match=r"speculate.*mtp\.\*"):
        plain.generate([5], speculate="mtp")
    with pytest.raises(ArgumentError, match="speculate"):
        plain.generate([5], speculate="fast")
    with pytest.raises(CheckpointError, match=r"speculate.*mtp\.\*"):
        deltaic.load(tiny_folder, speculate="mtp")
    with pytest.raises(ArgumentError, match="speculate"):
        deltaic.load(tiny_folder, speculate=3)
    off = deltaic.load(tiny_mtp_folder, dtype="f32", threads=1, speculate="off")
    assert not off.info()["mtp"]
    with_mtp = deltaic.load(tiny_mtp_folder, dtype="f32", threads=1, speculate="mtp")
    assert with_mtp.info()["mtp"]
    assert with_mtp.info()["weight_bytes"] > off.info()["weight_bytes"]
    assert with_mtp.new_state().bytes_for(100) > off.new_state().bytes_for(100)
    off._runner.fixed_depth = with_mtp._runner.fixed_depth = 2
    assert off.generate([5], max_new_tokens=20).drafted == 0
    assert with_mtp.generate([5], max_new_tokens=20).drafted > 0
    assert with_mtp.generate([5], max_new_tokens=20, speculate="off").drafted == 0


def test_the_command_line_has_it(capsys):
    assert cli.main(["demo", "--speculate", "mtp"]) == 0
    assert cli.main(["demo", "--speculate", "perhaps"]) == 2
    assert "speculate" in capsys.readouterr().err


# ------------------------------------------------------------------------------- drafts from the text


@given(ids=st.lists(st.integers(0, 3), max_size=40), count=st.integers(1, LOOKUP_DEPTH))
def test_lookup_finds_what_followed_last(ids, count):
    lookup = Lookup(ids[: len(ids) // 2])
    lookup.find()
    lookup.ids += ids[len(ids) // 2 :]
    expected = None
    for i, n in enumerate(MATCHES):
        places = [p for p in range(n, len(ids)) if ids[p - n : p] == ids[len(ids) - n :]]
        if places and len(ids) >= n:
            expected = (i, places[-1])
            break
    assert lookup.find() == expected
    if expected is not None:
        drafts, text = lookup.drafts(expected[1], count), list(ids)
        for _ in range(count):
            text.append(text[expected[1] + len(text) - len(ids)])
        assert drafts == text[len(ids) :]


# ------------------------------------------------------------------------------- how many


class Simulated:
    """A machine whose steps take known times, and drafts that are right with known probabilities."""

    def __init__(self, mode, *, row=0.1, draft=0.05, right=0.0, seed=0):
        self.mtp, self.costs, self.acceptances, self.fixed_depth = object(), Costs(), [], None
        self.row, self.cost_of_draft, self.right, self.rests = row, draft, right, 0
        self.speculator = Speculator(self, None, [], mode)
        self.rng = np.random.default_rng(seed)
        self.depths, self.tokens, self.seconds = [], 0, 0.0

    def step(self):
        speculator = self.speculator
        source, depth = speculator._choose(None, 4)
        assert source == 0
        speculator._chosen = 0 if depth else None
        accepted = sum(itertools.takewhile(bool, (int(self.rng.random() < self.right) for _ in range(depth))))
        seconds = 1 + depth * (self.row + self.cost_of_draft)
        speculator.learn(depth, accepted, seconds)
        self.seconds += seconds
        self.tokens += 1 + accepted
        self.depths.append(depth)

    def run(self, steps):
        first, tokens, seconds = len(self.depths), self.tokens, self.seconds
        for _ in range(steps):
            self.step()
        return self.depths[first:], (self.tokens - tokens) / (self.seconds - seconds)


def test_auto_loses_little_where_nothing_is_predicted():
    for seed in range(5):
        machine = Simulated("auto", row=0.3, right=0.0, seed=seed)
        assert machine.run(200)[1] > 0.985
        assert machine.run(1000)[1] > 0.995


def test_auto_never_drafts_where_it_cannot_pay():
    """Each draft costs as much as a step: even if all are right there is nothing to win, which is found out soon."""
    machine = Simulated("auto", row=1.0, draft=0.2, right=1.0)
    depths, speed = machine.run(300)
    assert speed > 0.97
    assert sum(depths) <= 3 * (1 + 2 + 3 + 4)  # three measurements of each
    assert sum(machine.run(300)[0]) == 0
    assert not machine.speculator.uses_mtp  # nor are the layer's entries kept up
    assert not Speculator(machine, None, [], "auto").uses_mtp
    assert Speculator(machine, None, [], "mtp").uses_mtp
    cheap = Simulated("auto", row=0.1, right=0.0)
    cheap.run(300)
    assert cheap.speculator.uses_mtp  # the text may become predictable


def test_depth_follows_the_acceptance():
    machine = Simulated("auto", row=0.1, draft=0.05, right=0.95)
    machine.run(50)
    depths, speed = machine.run(200)
    assert np.mean(depths) > 3.5
    assert speed > 2
    machine.right = 0.3  # worth one draft at best
    machine.run(100)
    assert np.mean(machine.run(200)[0]) < 1.6
    machine.right = 0.0
    machine.run(100)
    assert np.mean(machine.run(200)[0]) < 0.05
    machine.right = 0.95  # it is tried again now and then
    machine.run(1000)
    assert np.mean(machine.run(100)[0]) > 3


def test_a_mode_that_was_asked_for_always_drafts():
    machine = Simulated("mtp", row=0.3, right=0.0)
    assert machine.run(3)[0] == [0, 0, 0]  # plain steps have to be measured first
    depths = machine.run(400)[0]
    assert set(depths) <= set(range(MTP_DEPTH + 1))
    assert depths.count(0) <= 2  # and now and then again


def test_acceptance_counts_only_what_was_tried():
    acceptance = Acceptance(4)
    for step in range(200):
        acceptance.record(4, 2, step + 1)  # the third is always wrong, the fourth never tried
    one, two, three, four = np.diff([1.0, *acceptance.expected(200)])
    assert one > 0.95
    assert two / one > 0.95
    assert three / two < 0.15
    assert four / three == pytest.approx(three / two)  # taken to be like the place before


def test_one_slow_step_does_not_decide():
    costs = Costs()
    assert not costs.known
    for seconds in (9.0, 1.0, 1.0):
        costs.record_step(1, seconds)
    costs.record_step(2, 7.0)  # the first of its kind
    assert costs.step(2) == pytest.approx(1.1)
    costs.record_step(4, 0.5)
    assert costs.step(4) == 1.0  # never less than a plain step
    for _ in range(300):
        costs.record_step(2, 1.1)
    assert not costs.known  # too long ago

    costs = Costs()
    for _ in range(20):
        costs.record_step(1, 1.0)
        costs.record_step(2, 1.2)
    costs.record_step(2, 50.0)
    assert costs.step(2) < 1.4
    assert costs.step(3) == pytest.approx(costs.step(2) + 0.1)
    assert costs.draft(2) == pytest.approx(0.2)  # a guess
    for _ in range(3):
        costs.record_draft(2, 0.2)
    assert costs.draft(1) == pytest.approx(0.1)
    assert costs.draft(4) == pytest.approx(0.4)
