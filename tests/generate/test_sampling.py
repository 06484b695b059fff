"""Sampling parameters, where their defaults come from, and the sampler's bookkeeping."""

import copy
import json
import math

import numpy as np
import pytest
from deltaic.errors import ArgumentError, ConfigError
from deltaic.generate.options import (
    SamplingParams,
    check_option_names,
    read_generation_config,
    recommended_sampling,
    resolve_sampling,
)
from deltaic.generate.sampling import Sampler, choosing_together, drafting_together
from deltaic.ops import reference
from deltaic.ops.layout import new_seen, row_bounds

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [NAN, INF, -0.1, 101, "1", None, True, [1.0], 1j]),
        ("top_k", [-1, 1.5, 1.0, "3", NAN, True, 2**31, None]),
        ("top_p", [0.0, 1.0001, -0.5, NAN, "1", None]),
        ("min_p", [-0.1, 1.1, NAN, None]),
        ("presence_penalty", [NAN, 2.1, -2.1, "0", None]),
        ("frequency_penalty", [NAN, INF, -3, None]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF, 101, None]),
        ("seed", [-1, 1.5, "1", NAN, 2**64, True]),
    ],
)
def test_a_wrong_value_names_the_argument_and_the_value(name, values):
    for value in values:
        with pytest.raises(ArgumentError) as caught:
            SamplingParams(**{name: value})
        assert str(caught.value).startswith(f"{name}: expected")
        assert repr(value) in str(caught.value)


def test_numpy_numbers_are_numbers():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(7))
    assert params == SamplingParams(temperature=0.5, top_k=3, seed=7)
    assert type(params.top_k) is int


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(ArgumentError, match="did you mean temperature"):
        check_option_names({"temprature": 1.0})


def test_call_before_checkpoint_before_recommendation():
    recommended = recommended_sampling(small=True, thinking=False, image=False)
    checkpoint = {"temperature": 0.6, "top_k": 7, "do_sample": True}
    params = resolve_sampling({"top_k": 3, "min_p": None}, checkpoint, recommended)
    assert params == SamplingParams(temperature=0.6, top_k=3, top_p=1.0, presence_penalty=2.0)


def test_do_sample_false_is_greedy_and_drops_recommended_penalties():
    recommended = recommended_sampling(small=True, thinking=False, image=False)
    params = resolve_sampling({}, {"do_sample": False, "temperature": 0.6}, recommended)
    assert params.greedy
    assert not params.penalised
    assert resolve_sampling({"temperature": 0.0, "presence_penalty": 1.0}, {}, recommended).presence_penalty == 1.0
    assert not resolve_sampling({"temperature": 0.9}, {"do_sample": False}, recommended).greedy


@pytest.mark.parametrize(
    ("small", "thinking", "image", "expected"),
    [
        (True, False, False, (1.0, 1.0, 20, 2.0)),
        (True, False, True, (0.7, 0.8, 20, 1.5)),
        (True, True, False, (1.0, 0.95, 20, 1.5)),
        (True, True, True, (0.6, 0.95, 20, 0.0)),
        (False, True, False, (1.0, 0.95, 20, 1.5)),
        (False, True, True, (1.0, 0.95, 20, 1.5)),
        (False, False, False, (0.7, 0.8, 20, 1.5)),
        (False, False, True, (0.7, 0.8, 20, 1.5)),
    ],
)
def test_recommendations_of_the_cards(small, thinking, image, expected):
    found = recommended_sampling(small=small, thinking=thinking, image=image)
    assert (found["temperature"], found["top_p"], found["top_k"], found["presence_penalty"]) == expected


def test_generation_config_is_read(tmp_path):
    assert read_generation_config(tmp_path) == {}
    raw = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": None, "eos_token_id": [1], "other": "x"}
    (tmp_path / "generation_config.json").write_text(json.dumps(raw))
    assert read_generation_config(tmp_path) == {"do_sample": True, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"temperature": -1}', '{"top_k": 1.5}', '{"top_p": NaN}', '{"do_sample": "no"}', "\xff",
     '{"max_new_tokens": 0}', "[" * 100_000],
)  # fmt: skip
def test_broken_generation_config(tmp_path, text):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        read_generation_config(tmp_path)


class Spy:
    """The definition, recording what `sample_rows` was given and answering from a list."""

    __name__ = "spy"
    count_tokens = staticmethod(reference.count_tokens)

    def __init__(self, answers):
        self.answers = list(answers)
        self.calls = []

    def sample_rows(self, logits, *, tokens, **kwargs):
        self.calls.append({k: copy.deepcopy(v) for k, v in kwargs.items()})
        tokens[:] = self.answers[len(self.calls) - 1]


def test_sampler_counts_what_was_generated():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 200, 500).tolist()
    spy = Spy(answers)
    sampler = Sampler(spy, SamplingParams(seed=0, presence_penalty=1.0), limit=300, prompt_ids=np.array([5, 5, 6]))
    for _ in answers:
        sampler.next(np.zeros(300, np.float32))
    for n, call in enumerate(spy.calls):
        (seen,) = call["seen"]
        expected = new_seen(300, np.empty(0, np.int64))  # prompts matter to the repetition penalty only
        reference.count_tokens(np.array([answers[:n]], np.int64), [expected])
        np.testing.assert_array_equal(seen, expected)
        assert call["limit"] == 300


def test_prompt_ids_reach_the_repetition_penalty():
    spy = Spy([1])
    sampler = Sampler(spy, SamplingParams(repetition_penalty=1.1), limit=9, prompt_ids=np.array([5, 2, 5, 9]))
    sampler.next(np.zeros(9, np.float32))
    assert spy.calls[0]["seen"][0][0].tolist() == [1 << 5 | 1 << 2]


def test_nothing_is_remembered_without_penalties():
    spy = Spy([1, 1])
    sampler = Sampler(spy, SamplingParams(), limit=9, prompt_ids=np.array([5, 2, 5]))
    for _ in range(2):
        sampler.next(np.zeros(9, np.float32))
    assert spy.calls[1]["seen"] == []


def draw(seed, n=50, **kwargs):
    sampler = Sampler(reference, SamplingParams(seed=seed), limit=40, prompt_ids=np.empty(0, np.int64), **kwargs)
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    logits[40:] = 50.0  # rows of a padded head, without a token
    return [sampler.next(logits) for _ in range(n)]


def test_seeds_reproduce_and_differ():
    first = [token for token, _ in draw(3)]
    assert first == [token for token, _ in draw(3)]
    assert first != [token for token, _ in draw(4)]
    assert [t for t, _ in draw(None)] != [t for t, _ in draw(None)]


def test_random_numbers_are_those_of_the_seed_one_by_one_whatever_is_drafted():
    spy, plain = Spy([0] * 400), np.random.default_rng(5)
    sampler = Sampler(spy, SamplingParams(seed=5), limit=9, prompt_ids=np.empty(0, np.int64))
    expected = [plain.random() for _ in range(150)]
    logits = np.zeros(9, np.float32)
    for i in range(100):
        sampler.next(logits)
        assert spy.calls[-1]["draws"] / 2**53 == expected[i]
        if i % 7 == 0:
            drafting = sampler.drafting(i % 40)
            assert (drafting.draws / 2**53).tolist() == expected[i + 1 :][: i % 40]


def test_tokens_chosen_together_are_those_chosen_one_by_one():
    """With the same random numbers, and numbers that are not used up are the next ones."""
    rows = np.random.default_rng(2).normal(size=(40, 50)).astype(np.float32)
    sampled = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "seed": 4}
    penalised = {"presence_penalty": 0.7, "frequency_penalty": 0.2, "repetition_penalty": 1.2}
    for options in ({"temperature": 0.0}, sampled, {"temperature": 0.0} | penalised, sampled | penalised):
        params = SamplingParams(**options)
        given = {"limit": 40, "prompt_ids": np.arange(5), "unused": [3, 17]}
        alone, together = Sampler(reference, params, **given), Sampler(reference, params, **given)
        expected = [alone.next(row.copy())[0] for row in rows]
        found: list[int] = []
        while len(found) < len(rows):
            choosing, accepted = together.choosing(5), 1 + len(found) % 4
            said, seen = choosing.take()
            reference.count_tokens(said, seen)
            # the drafts that turn out right, and others
            fed = np.array([-1, *expected[len(found) :][: accepted - 1], 7, 8, 9, 10])[:5]
            tokens = np.empty(5, np.int64)
            following = np.resize(rows[len(found) :], (5, 50))
            choosing.choice.choose(reference, following, choosing.draws, tokens, seen, row_bounds(5), fed)
            for token in tokens[:accepted].tolist():
                together.took(token)
                found.append(token)
            if len(found) < len(rows):
                found.append(together.next(rows[len(found)].copy())[0])
        assert found[: len(rows)] == expected


def test_tokens_whose_probabilities_are_wanted_are_chosen_one_by_one():
    sampler = Sampler(reference, SamplingParams(), limit=40, prompt_ids=np.empty(0, np.int64), logprobs=2)
    assert sampler.choosing(1) is None


def test_sequences_that_choose_alike_choose_together():
    def sampler(seed, logprobs=None, **options):
        params = SamplingParams(seed=seed, **options)
        return Sampler(reference, params, limit=40, prompt_ids=np.empty(0, np.int64), logprobs=logprobs)

    a, b = sampler(1, presence_penalty=1.0), sampler(2, presence_penalty=1.0)
    a.took(3)
    a.took(4)
    a.took(4)
    b.took(5)
    both = choosing_together([(a, 2), (b, 1)])
    assert both.draws.tolist() == [*a.draws(2), *b.draws(1)]
    said, seen = both.take()
    assert said.tolist() == [[3, 4, 4, -1], [5, -1, -1, -1]]
    assert len(seen) == 2
    assert choosing_together([(a, 1), (b, 1)]).take()[0].tolist() == [[-1], [-1]]  # given out once
    for other in (sampler(3), sampler(3, presence_penalty=1.5), sampler(3, presence_penalty=1.0, logprobs=0)):
        b.took(6)
        assert choosing_together([(a, 1), (other, 1), (b, 1)]) is None
    assert choosing_together([(b, 1)]).take()[0].tolist() == [[6, 6, 6, -1]]  # nothing was lost


def test_drafts_of_several_sequences_use_the_random_numbers_of_their_tokens():
    samplers = [
        Sampler(reference, SamplingParams(seed=seed), limit=40, prompt_ids=np.empty(0, np.int64)) for seed in (1, 2)
    ]
    choosing = drafting_together(samplers, 3)
    assert choosing.draws.reshape(3, 2).T.tolist() == [sampler.draws(3).tolist() for sampler in samplers]


def test_ids_without_a_token_are_never_sampled():
    assert max(token for token, _ in draw(3, n=200)) < 40
    likely = {token for token, _ in draw(3, n=200)}
    unused = sorted(likely)[:3]
    assert not likely.isdisjoint(unused)
    assert {token for token, _ in draw(3, n=200, unused=unused)}.isdisjoint(unused)


def test_logprobs_are_those_of_the_unmodified_distribution():
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler = Sampler(reference, params, limit=50, prompt_ids=np.empty(0, np.int64), logprobs=3)
    expected = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
    best = np.argsort(-logits)[:3].tolist()
    for _ in range(2):
        token, found = sampler.next(logits.copy())
        assert found.token_id == token
        assert found.logprob == pytest.approx(expected[token], abs=1e-5)
        assert [i for i, _ in found.top] == best
        assert [p for _, p in found.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    _, none = Sampler(reference, params, limit=50, prompt_ids=np.empty(0, np.int64)).next(logits)
    assert none is None


def test_alternatives_are_cut_to_the_vocabulary():
    sampler = Sampler(reference, SamplingParams(), limit=4, prompt_ids=np.empty(0, np.int64), logprobs=100)
    _, found = sampler.next(np.zeros(6, np.float32))
    assert len(found.top) == 4
