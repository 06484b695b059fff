"""States on the device: they move to the CPU and back, through memory, files, the prefix cache and sessions; several
sequences and speculation go through the same steps as on the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import deltaic
import emulator
import numpy as np
import pytest
import torch
from deltaic import State
from deltaic.errors import DeviceError, StateError
from deltaic.generate.options import SamplingParams
from deltaic.generate.sampling import Sampler
from deltaic.generate.speculate import Drafting
from deltaic.model.choice import Choosing
from deltaic.model.state import BLOCK_TOKENS
from deltaic.ops import cpu, cuda, reference
from deltaic.ops.cuda_tape import FEWEST_BLOCKS
from deltaic.ops.layout import new_seen
from helpers import array
from steps import further

PROMPT = "the cat sat on the mat"
MINIATURE = Path(deltaic.__file__).parent / "miniature"
GREEDY = {"max_new_tokens": 4, "temperature": 0.0, "thinking": False}
CLOSE = {"f32": 1e-4, "bf16": 2e-2}


@pytest.fixture
def load(model_device, tiny_folder):
    def load(device="cuda", dtype="f32", **options):
        return deltaic.load(tiny_folder, device=device, dtype=dtype, **options)

    return load


def assert_alike(found, expected, dtype="f32"):
    assert np.abs(found - expected).max() / np.abs(expected).max() <= CLOSE[dtype]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_state_goes_on_on_the_other_device(load, tmp_path, dtype):
    models = {"cuda": load("cuda", dtype), "cpu": load("cpu", dtype)}
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        state = models[here].new_state()
        models[here].forward(PROMPT, state)
        state.save(tmp_path / here)
        kept = State.load(tmp_path / here, cuda if there == "cuda" else cpu)
        rounded = State.load(tmp_path / here, cuda if here == "cuda" else cpu)
        twin = state.fork()
        expected = models[here].forward(" and", state)
        np.testing.assert_array_equal(models[here].forward(" and", rounded), expected)  # bit for bit through a file
        assert_alike(models[there].forward(" and", kept), expected, dtype)
        assert_alike(models[there].forward(" and", twin), expected, dtype)  # moved where it is first used
        assert isinstance(twin.delta, np.ndarray) == (there == "cpu")
        assert twin.length == state.length
        models[there].forward(" then", twin)  # it may be written there
        assert isinstance(state.delta, np.ndarray) == (here == "cpu")  # the one it was forked from has stayed


def test_int8_keys_and_values_are_refused(load, tmp_path):
    """They are the CPU's alone: at load, and as a state that comes from there."""
    with pytest.raises(DeviceError, match=r"kv_dtype: 'int8' is not available with device='cuda'; use 'bf16' or 'f32'"):
        load("cuda", kv_dtype="int8")
    on_cpu, model = load("cpu", kv_dtype="int8"), load("cuda")
    state = on_cpu.new_state()
    on_cpu.forward(PROMPT, state)
    state.save(tmp_path / "state")
    for refused in (state, State.load(tmp_path / "state", cpu), on_cpu.new_state()):
        with pytest.raises(StateError, match=r"keys and values are 'int8', .* expected .* 'bf16' or 'f32'"):
            model.forward(" and", refused)
    assert on_cpu.forward(" and", state).shape[0] > 0  # it is as it was
    with pytest.raises(StateError, match="int8"):
        model.forward(" and", State.load(tmp_path / "state", cuda))


def test_a_full_device_refuses_a_state_and_keeps_it(model_device, load):
    if not model_device.module.emulated:
        pytest.skip("needs a device whose memory can be set")
    state = load("cpu").new_state()
    load("cpu").forward(PROMPT, state)
    model = load("cuda")
    model_device.memory = model_device.used + 1000
    with pytest.raises(StateError, match="no memory on the device"):
        model.forward(" and", state)
    assert isinstance(state.delta, np.ndarray)
    model_device.memory = 1 << 40
    assert np.isfinite(model.forward(" and", state)).all()


def test_the_prefix_cache_gives_the_same_bits(load):
    model, cold = load(dtype="bf16", cache_bytes=64 << 20), load(dtype="bf16", cache_bytes=0)
    asked = [{"role": "user", "content": PROMPT}]
    first = model.chat(asked, **GREEDY)
    again = model.chat(asked, **GREEDY)
    assert again.cached_tokens == again.prompt_tokens
    assert first.token_ids == again.token_ids == cold.chat(asked, **GREEDY).token_ids
    longer = [*asked, {"role": "assistant", "content": first.text}, {"role": "user", "content": "why?"}]
    found, expected = model.chat(longer, **GREEDY), cold.chat(longer, **GREEDY)
    assert found.cached_tokens > 0
    assert found.token_ids == expected.token_ids
    state = next(iter(model.cache._entries.values())).state
    assert model.cache.nbytes >= state.nbytes


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_cache_folder_serves_both_devices(load, tmp_path, dtype):
    asked = [{"role": "user", "content": PROMPT}]
    expected = load("cpu", dtype, cache_bytes=0).chat(asked, **GREEDY)
    for writer, reader in (("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        folder = tmp_path / f"{writer}-{reader}"
        model = load(writer, dtype, cache_bytes=64 << 20, cache_folder=folder)
        first = model.chat(asked, **GREEDY)
        model.cache.flush()
        again = load(reader, dtype, cache_bytes=64 << 20, cache_folder=folder).chat(asked, **GREEDY)
        assert again.cached_tokens == again.prompt_tokens
        assert again.token_ids[0] == first.token_ids[0]
        if dtype == "f32" or writer == reader:
            assert again.token_ids == (expected if dtype == "f32" else first).token_ids


def test_sessions_fork_and_go_on_on_the_other_device(load, tmp_path):
    talk = load("cuda", cache_bytes=0).session(**GREEDY)
    plain = load("cpu", cache_bytes=0).session(**GREEDY)
    assert talk.say("one").token_ids == plain.say("one").token_ids
    twin = talk.fork()
    picture = (np.arange(64 * 64 * 3) % 251).reshape(64, 64, 3).astype(np.uint8)
    second, other = talk.say("two", images=picture), twin.say("three")
    assert second.cached_tokens > 0
    talk.save(tmp_path / "talk")
    moved = load("cpu", cache_bytes=0).load_session(tmp_path / "talk")
    back = load("cuda", cache_bytes=0).load_session(tmp_path / "talk")
    plain_twin = plain.fork()
    assert plain.say("two", images=picture).token_ids == second.token_ids
    assert plain_twin.say("three").token_ids == other.token_ids
    expected = plain.say("four").token_ids
    for session in (talk, moved, back):
        result = session.say("four")
        assert result.token_ids == expected
        assert result.cached_tokens > 0


def test_several_sequences_get_what_they_get_alone(load):
    """Decoded together, one token of each per step; the scheduler's prompts are read beside."""
    model = load(dtype="bf16", cache_bytes=0)
    prompts = ["the cat", "a dog sat on it", PROMPT]
    alone = [model.generate(p, max_new_tokens=4, temperature=0.0).token_ids for p in prompts]
    scheduler = model.scheduler()
    chats = [model.chat(p, **GREEDY).token_ids for p in prompts]
    requests = [scheduler.submit([{"role": "user", "content": p}], **GREEDY) for p in prompts]
    while scheduler.step():
        pass
    assert [request.result.token_ids for request in requests] == chats
    states = [model.new_state() for _ in prompts]
    for state, prompt in zip(states, prompts, strict=True):
        model.forward(prompt, state)
    hidden = array(model._runner.decode([ids[0] for ids in alone], states)[0])
    for i, (prompt, ids) in enumerate(zip(prompts, alone, strict=True)):
        state = model.new_state()
        model.forward(prompt, state)
        np.testing.assert_array_equal(array(model._runner.step(ids[0], state))[0], hidden[i])
        np.testing.assert_array_equal(array(state.delta), array(states[i].delta))


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_drafts_that_are_verified_get_the_bits_of_decoding(load, accepted):
    model = load(dtype="bf16")
    runner, ids = model._runner, [5, 6, 7]
    plain, state = model.new_state(), model.new_state()
    for one in (plain, state):
        model.forward(PROMPT, one)
    verification = runner.verify([state], [ids])
    rows = [array(runner.step(token, plain))[0] for token in ids]
    np.testing.assert_array_equal(array(verification.hidden), rows)
    runner.commit(verification, [accepted])
    expected = model.new_state()
    model.forward(PROMPT, expected)
    for token in ids[:accepted]:
        runner.step(token, expected)
    for name in ("conv", "delta"):
        np.testing.assert_array_equal(array(getattr(state, name)), array(getattr(expected, name)))
    assert (state.length, state.token_ids) == (expected.length, expected.token_ids)
    ragged = runner.verify([state, expected], [[1, 2], [3]])
    np.testing.assert_array_equal(array(ragged.hidden)[2], array(runner.step(3, expected.fork()))[0])


def test_speculation_gives_the_tokens_of_plain_decoding(model_device):
    """The miniature, whose MTP layer drafts."""
    options = {"max_new_tokens": 6, "temperature": 0.7, "seed": 3, "thinking": False}
    plain = deltaic.load(MINIATURE, device="cuda", dtype="bf16", speculate="off", cache_bytes=0)
    model = deltaic.load(MINIATURE, device="cuda", dtype="bf16", speculate="mtp", cache_bytes=0)
    model._runner.fixed_depth = 2
    expected, found = plain.chat("How many?", **options), model.chat("How many?", **options)
    assert found.token_ids == expected.token_ids
    assert found.drafted > 0


PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.1, "repetition_penalty": 1.1}


@pytest.fixture(params=[{}, PENALTIES], ids=["plain", "penalties"])
def speculating(model_device, request):
    """(the miniature, a sampler, what its text holds, a state with a few tokens, the hidden row of the last one)"""
    model = deltaic.load(MINIATURE, device="cuda", dtype="bf16", cache_bytes=0)
    params, (limit, unused) = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, **request.param), model._sampled_ids
    sampler = Sampler(cuda, params, limit=limit, prompt_ids=np.arange(3), unused=unused)
    seen = [new_seen(limit, np.arange(3))] if request.param else []
    state, prompt = model.new_state(), model.prepare(PROMPT)
    hidden = list(model._runner.hidden(prompt, state, [len(prompt)]))[-1][-1:]
    return model, sampler, seen, state, hidden


def chosen_rows(choosing, logits, seen, fed):
    """By the definition, from logits of the last of the rows of one text."""
    tokens = np.zeros(len(logits), np.int64)
    draws = choosing.draws[len(fed) - len(logits) :][: len(logits)]
    choosing.choice.choose(reference, logits, draws, tokens, seen, np.array([0, len(fed)]), np.array(fed))
    return tokens.tolist()


@contextmanager
def counted(device):
    """A dict that afterwards says what was done on the emulated device, which is not on a GPU."""
    names, facts = ("uploads", "launches", "replays", "downloads"), {}
    before = {name: getattr(device, name, 0) for name in names}
    yield facts
    facts.update((name, getattr(device, name, 0) - before[name]) for name in names)


ONCE = {"uploads": 1, "launches": 0, "replays": 1, "downloads": 1}


def test_a_token_is_one_replay(model_device, speculating):
    """Numbers are sent once, one graph runs, the token is read once; with the bits and the token of separate calls."""
    model, sampler, seen, state, _ = speculating
    runner, plain = model._runner, state.fork()
    token = 5
    for turn in range(4):
        choosing = sampler.choosing(1)
        logits = array(runner.text.logits(runner.step(token, plain)))
        with counted(model_device) as facts:
            hidden, _, (chosen,) = runner.decode([token], [state], head=True, choosing=choosing)
        if turn and model_device.module.emulated:
            assert facts == ONCE
        np.testing.assert_array_equal(array(runner.text.logits(hidden)), logits)
        assert [chosen] == chosen_rows(choosing, logits, seen, [token])
        np.testing.assert_array_equal(array(state.delta), array(plain.delta))
        sampler.took(chosen)
        reference.count_tokens(np.array([[chosen]] * len(seen)), seen)
        token = chosen


@pytest.mark.parametrize("depth", [1, 3])
def test_a_round_is_one_replay(model_device, speculating, depth):
    """What is owed, drafts, their verification and the tokens after each: those of the parts, one by one."""
    model, sampler, seen, state, hidden = speculating
    runner, mtp, before = model._runner, model._runner.mtp, None
    plain, tokens = state.fork(), [5]
    for turn in range(7):
        accepted = 1 + turn % (depth + 1)
        choosing = sampler.drafting(1 + depth)
        with counted(model_device) as facts:
            drafting = Drafting(state, state.length - len(tokens), hidden, tokens, depth, sampler)
            v = runner.draft_and_verify(drafting, before)
        if turn > depth + 1 and model_device.module.emulated:
            assert facts == ONCE
        m = mtp.extend(hidden, [tokens], [plain], [plain.length - len(tokens)], 1)
        drafts = []
        for ahead in range(depth):
            if ahead:
                m = further(mtp, m, drafts[-1], plain, ahead - 1)
            drafts += chosen_rows(choosing, array(mtp.logits(m)), seen, [tokens[-1], *drafts])
        assert v.tokens == [[tokens[-1], *drafts]]
        rows = runner.verify([plain], v.tokens, head=True)
        np.testing.assert_array_equal(array(v.hidden), array(rows.hidden))
        assert v.chosen == chosen_rows(choosing, array(rows.logits), seen, v.tokens[0])
        runner.count(v, [accepted])
        runner.commit(rows, [accepted])
        before, hidden = v, v.hidden[:accepted]
        tokens = [*drafts[: accepted - 1], v.chosen[accepted - 1]]
        for token in tokens:
            sampler.took(token)
            reference.count_tokens(np.array([[token]] * len(seen)), seen)
    runner.write(before)
    for name in ("conv", "delta"):
        np.testing.assert_array_equal(array(getattr(state, name)), array(getattr(plain, name)))


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_of_several_sequences_are_one_replay(model_device, depth):
    """Two replays with the entries before them, one reading of tokens; those that each sequence gets alone."""
    model = deltaic.load(MINIATURE, device="cuda", dtype="bf16", cache_bytes=0)
    runner, limit = model._runner, model._sampled_ids[0]
    params = {"temperature": 0.8, "top_k": 20, "presence_penalty": 2.0}
    samplers = [
        Sampler(cuda, SamplingParams(seed=seed, **params), limit=limit, prompt_ids=np.arange(3)) for seed in (1, 2)
    ]
    states, hidden = [model.new_state(), model.new_state()], []
    for state, prompt in zip(states, (PROMPT, "a dog"), strict=True):
        ready = model.prepare(prompt)
        hidden.append(list(runner.hidden(ready, state, [len(ready)]))[-1][-2:])
    for turn in range(3):
        for sampler in samplers:
            sampler.took(7 + turn)  # what the penalties know
        drafting = [
            Drafting(state, state.length - 2, rows, [5, 7 + turn], depth, sampler)
            for state, rows, sampler in zip(states, hidden, samplers, strict=True)
        ]
        twins = [state.fork() for state in states]
        with counted(model_device) as facts:
            found = runner.draft(drafting)
        if turn and model_device.module.emulated:
            assert (facts["replays"], facts["downloads"]) == (2, 1)
        for ids, drafting_of_one, twin in zip(found, drafting, twins, strict=True):
            m = runner.mtp.extend(drafting_of_one.hidden, [[5, 7 + turn]], [twin], [twin.length - 2])[1:]
            choosing = drafting_of_one.sampler.drafting(depth)
            seen = new_seen(limit, np.empty(0, np.int64))
            reference.count_tokens(np.arange(7, 8 + turn)[None], [seen])
            for ahead, draft in enumerate(ids):
                if ahead:
                    m = further(runner.mtp, m, ids[ahead - 1], twin, ahead - 1)
                one = Choosing(choosing.choice, choosing.draws[ahead : ahead + 1])
                assert [draft] == chosen_rows(one, array(runner.mtp.logits(m)), [seen], [0])


def test_a_prompt_is_sent_once_for_all_layers(model_device, load):
    """Numbers and addresses that its layers share: an upload costs as much of the host's time as an operator."""
    model = load(dtype="bf16")
    state, rows = model.new_state(), 2 * cuda.FEW
    for start in (0, rows):
        x, bounds = model._runner.text.embed(np.arange(rows) + start), np.array([0, rows])
        places = np.repeat(np.arange(start, start + rows)[:, None], 3, axis=1)
        with counted(model_device) as facts:
            model._runner.text.forward(x, places, [state], bounds, prefill=True)
        if model_device.module.emulated:  # lengths, starts, angles (2), arrays (2), blocks
            assert facts["uploads"] <= 7


def test_sequences_of_unlike_lengths_share_a_graph(model_device, load):
    model = load(dtype="bf16")
    runner = model._runner
    states = [model.new_state(), model.new_state()]
    for state, prompt in zip(states, (PROMPT, "a dog"), strict=True):
        model.forward(prompt, state)
    for turn, tokens in enumerate(([[1, 2], [3]], [[7], [8, 9]], [[1, 2], [3]])):
        with counted(model_device) as facts:
            hidden = array(runner.verify(states, tokens).hidden)
        if turn and model_device.module.emulated:
            assert facts == ONCE | {"downloads": 0}
        rows = [array(runner.verify([state], [ids]).hidden) for state, ids in zip(states, tokens, strict=True)]
        np.testing.assert_array_equal(hidden, np.concatenate(rows))


def test_a_graph_serves_longer_sequences_and_other_keys(model_device, load):
    """Beyond the blocks that it has room for there is another one, and one for K/V of another dtype."""
    model, ids = load(dtype="bf16"), [int(i) for i in np.arange(80) % 250]
    runner = model._runner
    for kv_dtype in ("bf16", "f32"):
        state, plain = (State(model.config.text, cuda, kv_dtype, context=4096) for _ in range(2))
        for one in (state, plain):
            model.forward(ids, one)
        for turn, token in enumerate(ids[:4]):
            if turn == 2:
                state.reserve(BLOCK_TOKENS * FEWEST_BLOCKS + 1)
            found = array(runner.step(token, state))
            wanted = runner.text.forward(
                runner.text.embed(np.array([token])), np.full((1, 3), plain.length), [plain], np.array([0, 1])
            )
            np.testing.assert_array_equal(found, array(wanted))
    assert runner.recordings == 4


def test_too_little_memory_is_said_before_anything_is_allocated(model_device, load):
    if not model_device.module.emulated:
        pytest.skip("needs a device whose memory can be set")
    model_device.memory = 7_800_000_000 + model_device.used
    with pytest.raises(DeviceError, match=r"the model needs 9\.1 GB of GPU memory, 7\.8 GB are free"):
        cuda.require_memory(9_100_000_000)
    before = model_device.used
    model_device.memory = before + 100_000
    with pytest.raises(DeviceError, match=r"the model needs 0\.0 GB of GPU memory"):
        load("cuda")
    with pytest.raises(deltaic.ArgumentError, match="context: 2048 tokens need"):
        load("cuda", context=2048)
    assert model_device.used - before < 200_000, "what a refused load allocated was not given back"
    model_device.memory = 1 << 40
    assert np.isfinite(load("cuda").forward(PROMPT)).all()


def test_memory_that_runs_out_on_the_way_leaves_a_usable_process(model_device, load):
    if not model_device.module.emulated:
        pytest.skip("needs a device whose memory can be set")
    model = load("cuda")
    state = model.new_state()
    expected = model.forward(PROMPT)
    before = model_device.used
    for room in (0, 1000, 30_000):
        model_device.memory = before + room
        with pytest.raises((DeviceError, StateError), match="memory"):
            model.forward(PROMPT, model.new_state() if room > 20_000 else state)
        assert model_device.used <= before + room
    model_device.memory = 1 << 40
    np.testing.assert_array_equal(model.forward(PROMPT), expected)


def test_a_fork_that_finds_no_memory_keeps_both(model_device, load):
    """The copy that the first write makes is counted like any other memory."""
    if not model_device.module.emulated:
        pytest.skip("needs a device whose memory can be set")
    model = load("cuda")
    state = model.new_state()
    model.forward(PROMPT, state)
    twin = state.fork()
    model_device.memory = model_device.used + 1000
    with pytest.raises(StateError, match="no memory"):
        model.forward(" and", twin)
    model_device.memory = 1 << 40
    np.testing.assert_array_equal(model.forward(" and", twin), model.forward(" and", state))


def test_tensors_of_another_device_are_refused(model_device):
    w = cuda.pack([np.ones((4, 8), np.float32)], "f32")
    with pytest.raises(cuda.ArgumentError, match="x is on meta, expected"):
        cuda.linear(torch.zeros(1, 8, device="meta"), w)
    with pytest.raises(cuda.ArgumentError, match="x is a ndarray, expected a torch tensor"):
        cuda.linear(np.zeros((1, 8), np.float32), w)


def test_a_quantised_folder_of_either_device_serves_both(model_device, tiny_folder, tmp_path):
    """Folders hold the CPU's layout, whatever will read them: repacked for the GPU as it is loaded."""
    packed = deltaic.quantize(tiny_folder, tmp_path / "packed", dtype="int8")
    models = [deltaic.load(packed, device=device, activations="float32") for device in ("cuda", "cpu")]
    assert models[0].info()["fingerprint"] == models[1].info()["fingerprint"]
    found, expected = (model.forward(PROMPT) for model in models)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error <= 2e-2, error  # of bfloat16 activations: that the numbers are the same, test_dense.py shows exactly


def test_the_emulator_counts_what_is_allocated(emulated):
    device = emulator.EmulatedDevice(emulated, memory=100)
    x = device.empty([20], torch.float32)
    assert device.free_bytes() == 20
    with pytest.raises(DeviceError):
        device.empty([6], torch.float32)
    del x
    assert device.free_bytes() == 100
