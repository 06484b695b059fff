"""Several generations at once: each gets what it gets alone, whoever joins, leaves, waits or fails beside it."""

from __future__ import annotations

import gc
import threading
import weakref

import deltaic
import numpy as np
import pytest
from deltaic.errors import ArgumentError, ImageError, PromptError, StateError
from deltaic.generate import prefix
from deltaic.generate.costs import Costs
from deltaic.generate.scheduler import Load, Scheduler
from deltaic.generate.speculate import share_rows
from deltaic.model.replay import Replay
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import picture, user

GREEDY = {"temperature": 0.0}
SYSTEM = {"role": "system", "content": "the cat sat on the mat. " * 4}


@pytest.fixture(params=["dense", "moe"])
def folder(request):
    return request.getfixturevalue("tiny_folder" if request.param == "dense" else "tiny_moe_folder")


@pytest.fixture
def model(tiny_folder, device):
    """One whose answers end where max_new_tokens says, and whose steps give one token each."""
    model = deltaic.load(tiny_folder, device=device, dtype="f32", cache_bytes=64 << 20, speculate="off")
    model.__dict__["end_ids"] = frozenset()
    return model


def facts(result):
    """A result without what depends on the clock and the cache."""
    return (
        result.text, result.reasoning, result.token_ids, result.finish_reason, result.stop_string,
        result.prompt_tokens, result.logprobs,
    )  # fmt: skip


class Recorded:
    """A sampler that also keeps the logits it is given."""

    def __init__(self, sampler):
        self.sampler, self.logits = sampler, []

    def choosing(self, rows):
        return None  # it wants the logits

    def next(self, logits):
        self.logits.append(logits.copy())
        return self.sampler.next(logits)


def recording(model, **limits):
    """A scheduler, and the samplers of its requests in order."""
    samplers = []

    def job(*args):
        made = model._job(*args)
        made.sampler = Recorded(made.sampler)
        samplers.append(made.sampler)
        return made

    return Scheduler(model._runner, model.new_state, job, **limits), samplers


def alone(model, prompt, **options):
    """(result, logits) of a prompt that nobody else shares a step with, decoded token by token."""
    job = model._job(prompt, None, options.pop("thinking", None), None, options)
    sampler = job.sampler = Recorded(job.sampler)
    from deltaic.generate.loop import generate_ids
    from deltaic.generate.stream import Stream

    stream = Stream(
        lambda: generate_ids(
            model._runner, job.prompt, job.reading, sampler, blank=model.new_state, end_ids=job.end_ids,
            max_new_tokens=job.max_new_tokens, speculator=job.speculator,
        ),
        job,
    )  # fmt: skip
    return stream.finish(), np.stack(sampler.logits)


# ------------------------------------------------------------------------------- the same as alone

PROMPTS = st.tuples(
    st.booleans(),  # with the system message
    st.sampled_from(["what?", "the dog sat on the mat and the cat", "a" * 70, "where is it? " * 9]),
    st.lists(st.integers(0, 1), max_size=1),
    st.integers(1, 12),  # new tokens
    st.integers(0, 4),  # steps until the next one comes
    st.sampled_from([GREEDY, GREEDY, {"temperature": 1.0, "seed": 3, "top_k": 20, "presence_penalty": 1.0}]),
)


@pytest.mark.parametrize("dtype", ["f32", "int4"])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    asked=st.lists(PROMPTS, min_size=2, max_size=6),
    limits=st.fixed_dictionaries({"max_sequences": st.integers(1, 5), "prefill_tokens": st.sampled_from([1, 16, 50])}),
    cached=st.booleans(),
    speculate=st.sampled_from([("off", None), ("lookup", 2), ("lookup", 4), ("auto", None)]),
    leave=st.integers(0, 9),
)
def test_each_gets_the_bits_that_it_gets_alone(
    folder, ops, device, monkeypatch, dtype, asked, limits, cached, speculate, leave
):
    """Whoever joins at which step, with which chunks and drafts, from the cache or not, and whoever leaves early."""
    if dtype == "int4" and not ops.SPLIT_INVARIANT:
        pytest.skip("there are no bits to compare")
    with monkeypatch.context() as patch:
        patch.setattr(prefix, "PREFILL_TOKENS", 32)
        patch.setattr(prefix, "CHECKPOINT_TOKENS", 64)
        model, cold = models(folder, device, dtype)
        model.cache.clear()
        model.cache.budget = 64 << 20 if cached else 0
        mode, model._runner.fixed_depth = speculate
        scheduler, samplers = recording(model, **limits)
        requests, prompts = [], []
        for system, text, images, new, wait, options in asked:
            prompt = [*([SYSTEM] if system else []), user(text, *map(picture, images))]
            prompts.append((prompt, {"max_new_tokens": new, **options}))
            requests.append(scheduler.submit(prompt, max_new_tokens=new, speculate=mode, **options))
            for _ in range(wait):
                scheduler.step()
        if leave < len(requests):
            requests[leave].close()
        while scheduler.step():
            pass
        assert scheduler.load == Load(0, 0, 0, 0)
        for i, (request, sampler, (prompt, options)) in enumerate(zip(requests, samplers, prompts, strict=True)):
            result, logits = alone(cold, prompt, speculate="off", **options)
            if i == leave:
                assert request.result.token_ids == result.token_ids[: len(request.result.token_ids)]
            else:
                assert facts(request.finish()) == facts(result)
            if ops.SPLIT_INVARIANT and sampler.logits:
                assert np.array_equal(np.stack(sampler.logits), logits[: len(sampler.logits)])


@pytest.mark.parametrize(("mode", "depth"), [("mtp", 1), ("mtp", 3), ("auto", None), ("auto", 2)])
def test_drafts_change_no_token(miniature, mode, depth):
    """The miniature's MTP layer is trained: drafts are right and wrong, of several sequences in one step."""
    prompts = [[user(f"What is {word}?")] for word in ("red", "a circle", "left of the star", "red red red", "3")]
    each = [GREEDY, {"temperature": 0.8, "seed": 1}, GREEDY, {"temperature": 0.8, "seed": 2}, GREEDY]
    options = {"each": each, "max_new_tokens": 24, "thinking": False}
    expected = [miniature.stream(p, max_new_tokens=24, thinking=False, speculate="off", **own).finish()
                for p, own in zip(prompts, each, strict=True)]  # fmt: skip
    miniature.cache.clear()
    miniature._runner.fixed_depth = depth
    found = miniature.generate_batch(prompts, speculate=mode, **options)
    assert [facts(result) for result in found] == [facts(result) for result in expected]
    assert sum(result.accepted for result in found) > 0 or depth is None
    again = miniature.generate_batch(prompts, speculate=mode, **options)  # from checkpoints, with entries of the layer
    assert [facts(result) for result in again] == [facts(result) for result in expected]


@pytest.fixture
def miniature(device):
    from deltaic.cli import MINIATURE

    model = deltaic.load(MINIATURE, device=device, cache_bytes=64 << 20)
    return model


def test_rows_are_shared_by_what_they_promise():
    costs = Costs()
    assert share_rows([[1.9, 2.7]], [False], 1, costs) == [0]  # nothing is known
    for rows, seconds in ((2, 1.1), (3, 1.2), (4, 2.0), (5, 3.0), (1, 1.0)) * 3:
        costs.record_step(rows, seconds)
        costs.record_draft(1, 0.0)
        costs.record_draft(2, 0.0)
    assert share_rows([[1.9, 2.7], [1.1, 1.2]], [False, False], 2, costs) == [2, 0]
    assert share_rows([[1.05], [1.05]], [False, False], 2, costs) == [0, 0]
    assert share_rows([[1.05], []], [True, True], 2, costs) == [1, 0]
    assert share_rows([[1.9], [1.8], [1.7]], [False] * 3, 3, costs) == [1, 1, 0]
    assert sum(share_rows([[1.9, 2.7]] * 20, [True] * 20, 20, costs)) == 12  # 32 rows at most


MODELS = {}


def models(folder, device, dtype):
    """A model with a cache and one without, made once."""
    key = (folder, device, dtype)
    if key not in MODELS:
        MODELS[key] = [deltaic.load(folder, device=device, dtype=dtype, cache_bytes=n) for n in (64 << 20, 0)]
    return MODELS[key]


def test_what_a_request_may_ask_for(model):
    """Seeds, log-probabilities, stop strings and thinking are each request's own."""
    prompt = [SYSTEM, user("what is it?")]
    asked = [
        {"temperature": 1.0, "seed": 1, "logprobs": 3},
        {"temperature": 1.0, "seed": 2},
        {"stop": ["e"], **GREEDY},
        {"thinking": True, "repetition_penalty": 1.3, **GREEDY},
        {"temperature": 0.5, "seed": 5, "min_p": 0.1, "max_new_tokens": 3},
    ]
    found = model.generate_batch([prompt] * 5, each=asked, max_new_tokens=12)
    for own, result in zip(asked, found, strict=True):
        expected = model.stream(prompt, **{"max_new_tokens": 12, **own}).finish()
        assert facts(result)[:-1] == facts(expected)[:-1]
        assert (result.logprobs is None) == ("logprobs" not in own)
        for mine, other in zip(result.logprobs or [], expected.logprobs or [], strict=True):
            assert mine.token_id == other.token_id
            assert abs(mine.logprob - other.logprob) < 1e-4


def test_the_pieces_are_those_of_a_stream(model):
    prompt = [user("what is it?")]
    request = model.scheduler().submit(prompt, max_new_tokens=9, thinking=True, **GREEDY)
    assert list(request) == list(model.stream(prompt, max_new_tokens=9, thinking=True, **GREEDY))
    assert list(request) == []
    assert request.result.tokens_per_second > 0
    assert request.result.time_to_first_token > 0


# ------------------------------------------------------------------------------- the cache


def test_a_shared_beginning_is_read_once_though_all_come_at_once(model):
    shared = len(model.tokenizer.encode(f"<|im_start|>system\n{SYSTEM['content'].strip()}<|im_end|>\n"))
    prompts = [[SYSTEM, user(f"{i} cats?")] for i in range(6)] + [[SYSTEM, user("0 cats?")], [user("hm")]]
    results = model.generate_batch(prompts, max_new_tokens=3, **GREEDY)
    assert [r.cached_tokens for r in results] == [0] + [shared] * 5 + [results[0].prompt_tokens, 0]
    assert results[6].token_ids == results[0].token_ids


def test_an_answer_leaves_its_checkpoint(model):
    ids = list(range(60, 90))
    first = model.generate_batch([ids], max_new_tokens=4, **GREEDY)[0]
    again = model.generate(ids + first.token_ids, max_new_tokens=1)
    assert again.cached_tokens == len(ids) + 3  # the last token was sampled, but not fed


def test_whoever_waits_for_a_beginning_goes_on_when_its_reader_leaves(model):
    scheduler = model.scheduler(prefill_tokens=8)
    decoding = scheduler.submit([1, 2, 3], max_new_tokens=100, **GREEDY)
    next(decoding)
    first = scheduler.submit([SYSTEM, user("one")], max_new_tokens=2, **GREEDY)
    second = scheduler.submit([SYSTEM, user("two")], max_new_tokens=2, **GREEDY)
    for _ in range(3):
        scheduler.step()
    assert scheduler._batch.running[2].reader is None
    first.close()
    assert second.finish().finish_reason == "length"
    decoding.close()


# ------------------------------------------------------------------------------- steps


def test_running_sequences_keep_their_pace(model, monkeypatch, ops):
    """While others decode, a step reads at most prefill_tokens rows, and everybody decodes in it."""
    sizes, text = [], model._runner.text
    forward, step = text.forward, text.step

    def read(x, positions, states, cuts, *, prefill=False, **options):
        sizes.append((len(x), prefill))
        return forward(x, positions, states, cuts, prefill=prefill, **options)

    def decode(tokens, states, trace=None, **options):
        sizes.append((sum(map(len, tokens)), False))
        return step(tokens, states, trace, **options)

    monkeypatch.setattr(text, "forward", read)
    monkeypatch.setattr(text, "step", decode)
    scheduler = model.scheduler(prefill_tokens=40)
    running = [scheduler.submit([i, 2, 3], max_new_tokens=60, **GREEDY) for i in range(3)]
    while scheduler.load.decoding < 3:
        scheduler.step()
    long = scheduler.submit([7] * 700, max_new_tokens=2, **GREEDY)
    for request in running:
        request.take()
    steps = 0
    while long.result.completion_tokens == 0:
        assert not long.ended
        sizes.clear()
        scheduler.step()
        steps += 1
        assert [len([p for p in request.take() if p.token_id is not None]) for request in running] == [1, 1, 1]
        assert sizes[0] == (3, False)
        assert sizes[1:] in ([(min(40 if ops.SPLIT_INVARIANT else 512, sizes[1][0]), True)],)
    assert steps == (18 if ops.SPLIT_INVARIANT else 2)
    for request in [*running, long]:
        request.close()
    sizes.clear()
    scheduler.submit([8] * 700, max_new_tokens=1, **GREEDY).finish()  # nobody is kept waiting: large chunks
    assert max(n for n, _ in sizes) == 512


def test_a_prompt_of_several_messages_is_read_in_one_step(model):
    if not model._ops.SPLIT_INVARIANT:
        pytest.skip("such op sets cut the prompt at every checkpoint")
    said = [user("one"), {"role": "assistant", "content": "yes"}, user("two")]
    scheduler = model.scheduler()
    with scheduler.submit(said, max_new_tokens=1, **GREEDY) as request:
        scheduler.step()
        assert request.result.completion_tokens == 1
    edited = model.chat([*said[:-1], user("three")], max_new_tokens=1, **GREEDY)
    assert 0 < edited.cached_tokens < edited.prompt_tokens


def test_a_short_prompt_overtakes_a_long_one(model, monkeypatch):
    monkeypatch.setattr(prefix, "PREFILL_TOKENS", 16)
    scheduler = model.scheduler(prefill_tokens=16)
    decoding = scheduler.submit([1], max_new_tokens=200, **GREEDY)
    next(decoding)
    long = scheduler.submit([7] * 300, max_new_tokens=1, **GREEDY)
    scheduler.step()
    short = scheduler.submit([8] * 20, max_new_tokens=1, **GREEDY)
    short.finish()
    assert not long.ended
    assert long.finish().finish_reason == "length"  # and the long one is not starved by many short ones


def test_pictures_come_one_per_step(model, monkeypatch):
    seen = []
    forward = model._runner.vision.forward
    monkeypatch.setattr(model._runner.vision, "forward", lambda images: seen.extend(images) or forward(images))
    scheduler = model.scheduler(prefill_tokens=512)
    decoding = scheduler.submit([1], max_new_tokens=100, **GREEDY)
    next(decoding)
    looking = scheduler.submit([user("what?", picture(0), picture(1), picture(2))], max_new_tokens=1, **GREEDY)
    before = 0
    while not looking.ended:
        scheduler.step()
        assert len(seen) - before <= 1
        before = len(seen)
    assert before == 3


# ------------------------------------------------------------------------------- limits


def test_at_most_so_many_run(model):
    scheduler = model.scheduler(max_sequences=2)
    requests = [scheduler.submit([i, 1], max_new_tokens=5, **GREEDY) for i in range(5)]
    order = []
    while scheduler.step():
        load = scheduler.load
        assert load.reading + load.decoding <= 2
        order += [i for i, request in enumerate(requests) if request.ended and i not in order]
    assert order[:2] in ([0, 1], [1, 0])
    assert all(request.result.finish_reason == "length" for request in requests)


def test_memory_is_set_aside_before_a_request_starts(model):
    blank = model.new_state()
    scheduler = model.scheduler(max_bytes=2 * blank.bytes_for(300))
    assert blank.tokens_within(blank.bytes_for(300)) == 384
    assert blank.tokens_within(blank.bytes_for(0) - 1) < 0
    requests = [scheduler.submit([i] * 200, max_new_tokens=20, **GREEDY) for i in range(4)]
    together = 0
    while scheduler.step():
        load, running = scheduler.load, scheduler._batch.running
        assert load.reserved_bytes <= scheduler.max_bytes
        assert sum(sequence.state.nbytes for sequence in running if sequence.reader) <= load.reserved_bytes
        together = max(together, load.reading + load.decoding)
    assert together == 2
    assert all(request.result.completion_tokens == 20 for request in requests)
    with pytest.raises(ArgumentError, match=r"max_new_tokens: a prompt of 3 tokens and 900 new ones need .* MiB"):
        scheduler.submit([1, 2, 3], max_new_tokens=900)
    with pytest.raises(ArgumentError, match="a prompt of 900 tokens"):
        scheduler.submit([1] * 900)
    assert len(scheduler.submit([1, 2, 3], stop=None, **GREEDY)._sequence.job.prompt) == 3  # takes what there is
    assert not scheduler.load.reserved_bytes


def test_first_come_first_served_also_for_the_large(model):
    """A large request waits for room; smaller ones that came later do not overtake it for ever."""
    blank = model.new_state()
    scheduler = model.scheduler(max_bytes=blank.bytes_for(0) * 3 + blank.bytes_for(1000))
    small = [scheduler.submit([1], max_new_tokens=30, **GREEDY)]
    scheduler.step()
    large = scheduler.submit([2] * 900, max_new_tokens=90, **GREEDY)
    small += [scheduler.submit([3], max_new_tokens=5, **GREEDY) for _ in range(3)]
    while not large.ended:
        scheduler.step()
        assert large._sequence.reader is not None or not any(request.ended for request in small[1:])
    for request in small:
        request.finish()


@pytest.mark.parametrize(
    "limits", [{"max_sequences": 0}, {"max_bytes": -1}, {"prefill_tokens": 0}, {"max_sequences": 1.5}]
)
def test_wrong_limits(model, limits):
    with pytest.raises(ArgumentError, match=next(iter(limits))):
        model.scheduler(**limits)


# ------------------------------------------------------------------------------- leaving


def states_of(scheduler):
    return [weakref.ref(sequence.reader) for sequence in scheduler._batch.running if sequence.reader is not None]


def test_closing_frees_the_state_at_once(model):
    scheduler = model.scheduler()
    requests = [scheduler.submit([i, 1], max_new_tokens=50, **GREEDY) for i in range(3)]
    for _ in range(4):
        scheduler.step()
    readers = states_of(scheduler)
    requests[1].close()
    assert [reader() is None for reader in readers] == [False, True, False]
    assert requests[1].result.finish_reason == "cancelled"
    assert requests[1].ended
    before = scheduler.load.reserved_bytes
    del requests[0]  # dropping is closing
    gc.collect()
    assert [reader() is None for reader in readers] == [True, True, False]
    assert 0 < scheduler.load.reserved_bytes < before
    waiting = model.scheduler(max_sequences=1)
    first, second = (waiting.submit([1], max_new_tokens=50, **GREEDY) for _ in range(2))
    waiting.step()
    second.close()
    assert waiting.load == Load(0, 0, 1, waiting.load.reserved_bytes)
    first.close()
    assert not waiting.busy


def test_closing_while_a_step_is_computed(model, monkeypatch):
    """From the stepping thread itself, as the garbage collector may, and from another one."""
    scheduler = model.scheduler()
    requests = [scheduler.submit([i, 1], max_new_tokens=50, **GREEDY) for i in range(3)]
    while scheduler.load.decoding < 3:
        scheduler.step()
    said = [request.result.completion_tokens for request in requests]
    decode = model._runner.decode

    def closing(tokens, states, **options):
        requests[0].close()
        thread = threading.Thread(target=requests[1].close)
        thread.start()
        thread.join()
        assert not requests[0].ended
        return decode(tokens, states, **options)

    with monkeypatch.context() as patch:
        patch.setattr(model._runner, "decode", closing)
        scheduler.step()
    assert [request.ended for request in requests] == [True, True, False]
    assert [request.result.completion_tokens for request in requests] == [said[0], said[1], said[2] + 1]
    assert requests[2].finish().completion_tokens == 50


def test_with_blocks_and_closing_the_scheduler(model):
    with model.scheduler() as scheduler:
        with scheduler.submit([1], max_new_tokens=50, **GREEDY) as request:
            next(request)
        assert request.ended
        other = scheduler.submit([1], max_new_tokens=50, **GREEDY)
        scheduler.step()
    assert other.ended
    assert other.result.finish_reason == "cancelled"
    assert len(list(other)) == 1  # what had been generated
    with pytest.raises(StateError, match="closed"):
        scheduler.submit([1])
    with pytest.raises(StateError, match="closed"):
        scheduler.start()


# ------------------------------------------------------------------------------- errors


def test_an_error_ends_its_own_request_only(model, monkeypatch):
    expected = model.generate([5, 6], max_new_tokens=8, **GREEDY).token_ids
    model.cache.clear()
    scheduler, samplers = recording(model)
    good = scheduler.submit([5, 6], max_new_tokens=8, **GREEDY)
    at_reading = scheduler.submit([user("what?", picture(0))], max_new_tokens=8, **GREEDY)
    at_sampling = scheduler.submit([7], max_new_tokens=8, **GREEDY)
    at_decoding = scheduler.submit([8], max_new_tokens=8, **GREEDY)

    def broken(*args):
        raise ImageError("broken")

    monkeypatch.setattr(model._runner, "see", broken)
    monkeypatch.setattr(samplers[2], "next", broken)
    full = at_decoding._sequence
    while full.reader is None:
        scheduler.step()
    assert full.job.prompt.token_ids.tolist() == [8]
    full.reader.state._max_tokens = 3  # as if memory ran out
    while scheduler.step():
        pass
    assert good.finish().token_ids == expected
    for request, error in (
        (at_reading, ImageError),
        (at_sampling, ImageError),
        (at_decoding, deltaic.ContextLengthError),
    ):
        assert isinstance(request.error, error)
        with pytest.raises(error):
            request.finish()
        assert request.ended
    assert at_decoding.result.completion_tokens == 3
    assert scheduler.load == Load(0, 0, 0, 0)


def test_an_error_of_a_whole_step_leaves_a_scheduler_that_works(model, monkeypatch):
    scheduler = model.scheduler(max_sequences=2)
    requests = [scheduler.submit([i], max_new_tokens=4, **GREEDY) for i in range(3)]
    scheduler.step()
    with monkeypatch.context() as patch:
        for owner, name in ((Replay, "__call__"), (model._runner.text, "run_layers")):
            patch.setattr(owner, name, lambda *a: (_ for _ in ()).throw(RuntimeError("bad")))
        scheduler.step()
    assert [type(request.error) for request in requests] == [RuntimeError, RuntimeError, type(None)]
    assert requests[2].finish().completion_tokens == 4
    again = scheduler.submit([4], max_new_tokens=50, **GREEDY)
    waiting = [scheduler.submit([i], max_new_tokens=2, **GREEDY) for i in range(2)]
    scheduler.step()
    with monkeypatch.context() as patch:
        for owner, name in ((Replay, "__call__"), (model._runner.text, "run_layers")):
            patch.setattr(owner, name, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scheduler.step()
    assert isinstance(again.error, StateError)
    assert waiting[1].finish().completion_tokens == 2


def test_wrong_arguments_are_refused_at_the_call(model):
    scheduler = model.scheduler()
    with pytest.raises(ArgumentError, match="temprature"):
        scheduler.submit([1], temprature=1)
    with pytest.raises(PromptError):
        scheduler.submit([])
    with pytest.raises(PromptError, match=r"prompts\[1\]: "):
        model.generate_batch([[1], [-1]])
    with pytest.raises(ArgumentError, match=r"prompts\[1\]: top_k"):
        model.generate_batch([[1], [2]], each=[{}, {"top_k": -1}])
    for wrong in ("ab", {"a": 1}, None, 3):
        with pytest.raises(PromptError, match="prompts"):
            model.generate_batch(wrong)
    for wrong in ([{}], "ab", [{}, 3]):
        with pytest.raises(ArgumentError, match="each"):
            model.generate_batch([[1], [2]], each=wrong)
    assert model.generate_batch([]) == []
    assert not scheduler.busy


# ------------------------------------------------------------------------------- batches


def test_a_batch_streams(model):
    prompts = ["the cat", [SYSTEM, user("what?")], [3, 4, 5]]
    expected = model.generate_batch(prompts, max_new_tokens=6, **GREEDY)
    texts = ["", "", ""]
    with model.stream_batch(prompts, max_new_tokens=6, **GREEDY) as stream:
        for i, piece in stream:
            texts[i] += piece.text
    assert texts == [result.text for result in expected]
    assert [facts(result) for result in stream.results] == [facts(result) for result in expected]
    assert stream.errors == [None] * 3
    assert facts(expected[0]) == facts(model.generate(prompts[0], max_new_tokens=6, **GREEDY))
    with model.stream_batch(prompts, max_new_tokens=50, **GREEDY) as stream:
        next(stream)
    assert {result.finish_reason for result in stream.results} == {"cancelled"}


def test_the_errors_of_a_batch_come_after_the_others(model, monkeypatch):
    see = model._runner.see
    monkeypatch.setattr(
        model._runner,
        "see",
        lambda image: see(image) if image.grid[1] > 4 else (_ for _ in ()).throw(ImageError("bad")),
    )
    prompts = [[user("what?", picture(0, 40))], "the cat"]
    stream = model.stream_batch(prompts, max_new_tokens=6, **GREEDY)
    with pytest.raises(ImageError, match="bad"):
        stream.finish()
    assert stream.results[1].completion_tokens == 6


@pytest.mark.parametrize("speculate", ["off", "lookup"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_tokens_of_sequences_that_choose_alike_come_from_the_step(model, monkeypatch, speculate, penalty):
    """Nobody computes logits for them while no prompt is read; while one is, all tokens are chosen at once; with other
    options beside them, each chooses for itself."""
    prompts = [[i, 5, 6, 5, 6] for i in range(3)]
    options = {"max_new_tokens": 16, "temperature": 1.0, "presence_penalty": penalty}
    alone = [model.generate(ids, seed=i, **options).token_ids for i, ids in enumerate(prompts)]
    calls, logits = [], model._runner.logits
    monkeypatch.setattr(model._runner, "logits", lambda hidden: calls.append(len(hidden)) or logits(hidden))
    scheduler = model.scheduler()
    model._runner.fixed_depth = 2
    mine = [scheduler.submit(ids, seed=i, speculate=speculate, **options) for i, ids in enumerate(prompts)]
    while scheduler.load.decoding < 3:
        scheduler.step()
    calls.clear()
    scheduler.step()
    scheduler.step()
    assert not calls
    like = scheduler.submit([8, 9], seed=7, speculate="off", **{**options, "max_new_tokens": 2})
    choose, choices = model._runner.choose, []
    monkeypatch.setattr(model._runner, "choose", lambda rows, *given: choices.append(len(rows)) or choose(rows, *given))
    scheduler.step()  # its prompt is read
    scheduler.step()
    assert choices == calls
    assert len(choices) == 1
    assert choices[0] >= 4
    calls.clear()
    other = scheduler.submit([9], max_new_tokens=4, speculate="off", **GREEDY)
    scheduler.step()  # its prompt is read
    scheduler.step()
    assert [n >= 4 for n in calls] == [True, True]
    assert len(choices) == 1
    assert like.finish().token_ids == model.generate([8, 9], seed=7, **{**options, "max_new_tokens": 2}).token_ids
    assert other.finish().token_ids == model.generate([9], max_new_tokens=4, **GREEDY).token_ids
    assert [request.finish().token_ids for request in mine] == alone
    model._runner.fixed_depth = None


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_no_token_can_be_chosen_from_ends_its_sequence_alone(model):
    scheduler = model.scheduler()
    broken, sound = (scheduler.submit([i, 2, 3], max_new_tokens=9, **GREEDY) for i in (4, 5))
    while scheduler.load.decoding < 2:
        scheduler.step()
    state = next(s for s in scheduler._batch.running if s.job is broken._sequence.job).state
    state.delta = np.full_like(state.delta, np.nan)
    with pytest.raises(ArgumentError, match="logits hold NaN"):
        broken.finish()
    assert sound.finish().token_ids == model.generate([5, 2, 3], max_new_tokens=9, **GREEDY).token_ids


# ------------------------------------------------------------------------------- threads


def test_many_threads_share_a_scheduler_that_has_its_own(model):
    prompts = [[SYSTEM, user(f"{i % 4} cats?")] for i in range(12)]
    expected = [model.chat(prompt, max_new_tokens=6, **GREEDY) for prompt in prompts[:4]]
    found, told = [None] * 12, threading.Event()

    def work(i):
        request = scheduler.submit(prompts[i], max_new_tokens=6, notify=told.set, **GREEDY)
        if i == 11:
            next(request)
            request.close()
        found[i] = request.finish()

    with model.scheduler(max_sequences=5).start() as scheduler:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads)
        assert told.is_set()
        assert [r.token_ids for r in found[:11]] == [expected[i % 4].token_ids for i in range(11)]
        assert found[11].finish_reason in ("cancelled", "length")
        endless = scheduler.submit([1], max_new_tokens=1000, **GREEDY)
        next(endless)
    assert endless.ended
    assert not any(thread.name == "deltaic-scheduler" for thread in threading.enumerate())


def test_threads_may_step_in_turn(model):
    """Without a thread of its own, whoever wants a piece computes for all."""
    scheduler = model.scheduler()
    requests = [scheduler.submit([i, 3], max_new_tokens=10, **GREEDY) for i in range(4)]
    threads = [threading.Thread(target=request.finish) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    expected = [model.generate([i, 3], max_new_tokens=10, **GREEDY).token_ids for i in range(4)]
    assert [request.result.token_ids for request in requests] == expected


def test_streams_and_a_scheduler_share_a_model(model):
    expected = model.generate([9, 8, 7], max_new_tokens=12, **GREEDY).token_ids
    with model.scheduler().start() as scheduler:
        request = scheduler.submit([9, 8, 7], max_new_tokens=12, **GREEDY)
        stream = model.stream([9, 8, 7], max_new_tokens=12, **GREEDY)
        assert stream.finish().token_ids == expected
        assert request.finish().token_ids == expected
