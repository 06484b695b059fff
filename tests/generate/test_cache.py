"""The prefix cache: what it finds, that a hit gives the bits of a miss, what it says, and its budget."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import deltaic
import numpy as np
import pytest
from deltaic.errors import ArgumentError, StateError
from deltaic.generate import prefill, prefix
from deltaic.generate.cache import Checkpoint, FeatureCache, PrefixCache
from deltaic.generate.loop import generate_ids
from deltaic.generate.prefix import PrefixDigest, sequence_keys, shared_length, split_points
from deltaic.model.state import BLOCK_TOKENS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import picture, user

GREEDY = {"temperature": 0.0}
SYSTEM = {"role": "system", "content": "the cat sat on the mat. " * 4}
END = 99  # of a message, in hand-made ids
HEADER = "<|im_start|>assistant\n<think>\n\n</think>\n\n"  # what the tiny template ends a prompt with


def assistant(text):
    return {"role": "assistant", "content": text}


def length(model, text):
    return len(model.tokenizer.encode(text))


class Watch:
    """A sampler that takes the best token that may be generated, and keeps the logits."""

    def __init__(self, model):
        self.logits, self._sampled_ids = [], model._sampled_ids

    def choosing(self, rows):
        return None  # it wants the logits

    def next(self, logits):
        self.logits.append(logits.copy())
        limit, unused = self._sampled_ids
        logits[unused] = -np.inf
        return int(logits[:limit].argmax()), None


def run(model, prompt, new_tokens=1):
    """(tokens, logits [n, vocab], how the prompt went through the cache)."""
    prompt = model.prepare(prompt)
    watch, reading = Watch(model), model._reading(prompt, None)
    stream = generate_ids(
        model._runner, prompt, reading, watch, blank=model.new_state, end_ids=(), max_new_tokens=new_tokens
    )
    return [token for token, _ in stream], np.stack(watch.logits), reading


@pytest.fixture(params=["dense", "moe"])
def folder(request):
    return request.getfixturevalue("tiny_folder" if request.param == "dense" else "tiny_moe_folder")


@pytest.fixture
def small_steps(monkeypatch):
    """Short prompts have what otherwise only long ones have: pauses and checkpoints inside messages."""
    monkeypatch.setattr(prefix, "PREFILL_TOKENS", 16)
    monkeypatch.setattr(prefix, "CHECKPOINT_TOKENS", 32)


@pytest.fixture
def load(folder, device, small_steps):
    def load(cache_bytes=64 << 20, **options):
        return deltaic.load(folder, device=device, dtype="f32", cache_bytes=cache_bytes, **options)

    return load


@pytest.fixture
def model(load):
    return load()


@pytest.fixture
def cold(load):
    return load(0)


# ------------------------------------------------------------------------------- where a prompt is cut


def test_split_points():
    assert split_points(np.full(600, 1), END) == [(512, False), (600, True)]
    assert split_points(np.full(512, 1), END) == [(512, True)]
    assert split_points(np.full(1, 1), None) == [(1, True)]
    long = split_points(np.full(5000, 1), END)
    assert [p for p, kept in long if kept] == [2048, 4096, 5000]
    assert [p for p, _ in long] == [*range(512, 5000, 512), 5000]
    ids = np.full(1300, 1)
    ids[[99, 700]] = END
    expected = [(101, True), (613, False), (702, True), (1214, False), (1300, True)]
    assert split_points(ids, END) == expected
    assert split_points(ids, None) == [(512, False), (1024, False), (1300, True)]
    assert split_points(ids[:101], END) == [(101, True)]
    assert split_points(ids[:100], END) == [(100, True)]


@given(st.lists(st.sampled_from([1, 2, END]), min_size=2, max_size=200), st.data())
def test_split_points_depend_on_the_tokens_before_them_alone(tokens, data):
    ids = np.array(tokens)
    cut = data.draw(st.integers(1, len(ids) - 1))
    other = np.concatenate([ids[:cut], data.draw(st.sampled_from([ids[:cut], np.full(50, END), np.full(50, 1)]))])
    inside = [[p for p in split_points(x, END) if p[0] < cut] for x in (ids, other)]
    assert inside[0] == inside[1]


# ------------------------------------------------------------------------------- keys


def test_keys_tell_pictures_apart_at_their_placeholders():
    ids = np.arange(20)
    plain, a = sequence_keys(ids, []), sequence_keys(ids, [(5, 6, "aa")])
    b, both = sequence_keys(ids, [(5, 6, "bb")]), sequence_keys(ids, [(5, 6, "aa"), (12, 4, "bb")])
    assert plain.tolist() == ids.tolist()
    assert [shared_length(a, x) for x in (plain, b, both, a)] == [5, 5, 12, 20]
    assert (a[5:11] < 0).all()
    assert len(set(a[5:9].tolist())) == 4  # 256 bits of digest
    assert sequence_keys(ids[:8], [(5, 6, "aa")]).tolist() == a[:8].tolist()


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300), st.integers(0, 300))
def test_shared_length(a, b, common):
    a, b = np.array([*[1] * common, *a]), np.array([*[1] * common, *b])
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert shared_length(a, b) == expected


# ------------------------------------------------------------------------------- a hit is a miss, bit for bit


def conversations():
    """Turns of conversations that share beginnings in many ways."""
    texts = st.sampled_from(["what?", "the dog sat on the mat and the cat", "a" * 70, "where is it?", ""])
    images = st.lists(st.integers(0, 1), max_size=1)
    turn = st.tuples(texts, images, texts)
    return st.lists(st.tuples(st.booleans(), st.lists(turn, min_size=1, max_size=3)), min_size=2, max_size=6)


def messages_of(system, turns):
    messages = [SYSTEM] if system else []
    for question, images, answer in turns:
        messages += [user(question, *map(picture, images)), assistant(answer)]
    return messages[:-1]


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations(), st.sampled_from([100_000, 400_000, 64 << 20]), st.booleans())
def test_what_was_read_gives_the_same_bits_from_the_cache(model, cold, asked, budget, generate):
    """Also while checkpoints are dropped, and with answers generated in between."""
    model.cache.clear()
    model.cache.budget = budget
    for system, turns in asked:
        prompt = model.prepare(messages_of(system, turns), thinking=False)
        tokens, logits, reading = run(model, prompt, 3 if generate else 1)
        expected_tokens, expected, nothing = run(cold, prompt, 3 if generate else 1)
        assert nothing.cached_tokens == 0
        if reading.kept and reading.kept[0].generated:  # never here: no prompt holds a generated answer
            pytest.fail("a generated prefix was matched")
        assert np.array_equal(logits, expected)
        assert tokens == expected_tokens
        assert model.cache.nbytes <= budget


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(2, 6)), min_size=2, max_size=4))
def test_what_was_generated_differs_by_rounding_only(model, cold, steps):
    """Raw sequences, with and without a picture, that grow by read and generated tokens, and branch."""
    rng = np.random.default_rng(0)
    seen = model.prepare("<|vision_start|><|image_pad|><|vision_end|>what?", images=[picture()]).token_ids.tolist()
    pool = [(rng.integers(0, 256, 30).tolist(), None), (seen, [picture()])]
    for which, more, new_tokens in steps:
        ids, images = pool[which % len(pool)]
        ids = ids + rng.integers(0, 256, more).tolist()
        tokens, logits, _ = run(model, model.prepare(ids, images=images), new_tokens)
        if model.config.image_token_id in tokens:
            continue
        for i in (0, new_tokens - 1):
            _, expected, _ = run(cold, cold.prepare(ids + tokens[:i], images=images))
            assert np.abs(logits[i] - expected[0]).max() <= 1e-4 * np.abs(expected[0]).max()
        grown = ids + tokens
        _, logits, reading = run(model, model.prepare(grown, images=images))
        assert reading.cached_tokens >= len(grown) - 1  # the last token was sampled, but not fed
        _, expected, _ = run(cold, cold.prepare(grown, images=images))
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
        pool.append((grown, images))


def test_a_prompt_asked_again_is_not_read_at_all(model, cold):
    prompt = model.prepare([SYSTEM, user("what?", picture())])
    first = run(model, prompt, 5)
    again = run(model, prompt, 5)
    assert first[2].cached_tokens == 0
    assert again[2].cached_tokens == len(prompt)
    assert again[2].miss_reason is None
    assert np.array_equal(again[1], first[1])
    assert np.array_equal(again[1], run(cold, prompt, 5)[1])


@pytest.mark.parametrize("kv_dtype", ["f32", "int8"])
def test_checkpoints_inside_a_pass_are_those_of_passes_that_end_there(tiny_mtp_folder, device, monkeypatch, kv_dtype):
    """In all that they hold; and as many passes are saved."""
    found, passes = [], []
    said = [SYSTEM, user("one", picture()), assistant("yes"), user("two"), assistant("no"), user("three")]
    for marks in (0, 3):
        monkeypatch.setattr(prefill, "MARKS", marks)
        model = deltaic.load(tiny_mtp_folder, device=device, dtype="f32", kv_dtype=kv_dtype, cache_bytes=64 << 20)
        if not model._ops.SPLIT_INVARIANT:
            pytest.skip("such op sets cut the prompt at every checkpoint")
        read, calls = model._runner.read, []
        monkeypatch.setattr(
            model._runner, "read", lambda *a, read=read, calls=calls, **k: calls.append(1) or read(*a, **k)
        )
        model.chat(said, max_new_tokens=3, speculate="mtp", **GREEDY)
        found.append({c.length: c for c in model.cache._entries.values()})
        passes.append(len(calls))
    assert passes == [7, 2]
    assert sorted(found[0]) == sorted(found[1])
    assert len(found[0]) == 8  # one one after the answer
    assert found[1][max(found[1])].state.mtp_length > 100
    for cut, inside in ((found[0][n], found[1][n]) for n in found[0]):
        a, b = cut.state, inside.state
        assert np.array_equal(a.conv, b.conv)
        assert np.array_equal(a.delta, b.delta)
        assert np.array_equal(cut.hidden, inside.hidden)
        for name in ("token_ids", "images", "length", "rope_delta", "mtp_first", "mtp_length", "intact"):
            assert getattr(a, name) == getattr(b, name), name
        for tables, length in (((a.kv, b.kv), a.length), ((a.mtp, b.mtp), a.mtp_length)):
            assert len(tables[0]) == len(tables[1])
            for i, blocks in enumerate(zip(tables[0].blocks, tables[1].blocks, strict=True)):
                rows = length - i * BLOCK_TOKENS
                assert np.array_equal(*(block[:, :, :, :rows] for block in blocks))


def test_a_state_of_before_and_what_came_after_do_not_disturb_each_other(model, cold):
    """Each of the two goes on, in either order, in the block that they share."""
    if not model._ops.SPLIT_INVARIANT:
        pytest.skip("such op sets cut the prompt at every checkpoint")
    said = [SYSTEM, user("one"), assistant("yes"), user("two")]
    whole = run(model, model.prepare(said), 6)
    for last in ("three", "four", "two"):
        prompt = model.prepare([*said[:-1], user(last)])
        again = run(model, prompt, 6)
        assert again[2].cached_tokens > 0
        assert np.array_equal(again[1], run(cold, prompt, 6)[1])
    assert np.array_equal(again[1], whole[1])


def test_results_report(model):
    options = {"max_new_tokens": 3, **GREEDY}
    first = model.chat([SYSTEM, user("what?")], **options)
    again = model.chat([SYSTEM, user("what?")], **options)
    assert (first.cached_tokens, again.cached_tokens) == (0, again.prompt_tokens)
    assert "no prompt that begins like this" in first.cache_miss_reason
    assert again.cache_miss_reason is None
    assert again.token_ids == first.token_ids
    assert (
        deltaic.load(model.folder, device=model.device, cache_bytes=0)
        .chat([user("what?")], **options)
        .cache_miss_reason.startswith("the cache is off")
    )


# ------------------------------------------------------------------------------- conversations


def test_ten_turns_read_only_what_is_new(model):
    """The tiny template drops the empty thinking part of old answers, so each turn reads the last answer again."""
    messages, before = [SYSTEM], length(model, f"<|im_start|>system\n{SYSTEM['content'].strip()}<|im_end|>\n")
    for turn in range(10):
        messages.append(user(f"question {turn}: what is on the mat?"))
        result = model.chat(messages, max_new_tokens=4, thinking=False, **GREEDY)
        assert result.cached_tokens == (before if turn else 0)
        before = result.prompt_tokens - length(model, HEADER)
        messages.append(assistant(f"answer {turn}"))
        if turn:  # both prompts go on with <|im_start|>assistant and a line break
            shared = result.cached_tokens + length(model, "<|im_start|>assistant\n")
            assert result.cache_miss_reason.startswith(f"the prompt differs at token {shared} from")


def test_ten_turns_of_a_template_that_keeps_everything(model):
    """Where the next prompt holds the answer as it was generated, nothing is read twice."""
    ids = model.prepare([SYSTEM, user("what?")]).token_ids.tolist()
    cached = 0
    for turn in range(10):
        result = model.generate(ids, max_new_tokens=6, stop=None, **GREEDY)
        assert result.cached_tokens == cached
        assert (result.cache_miss_reason is None) == (turn > 0)
        cached = len(ids) + result.completion_tokens - 1
        ids += result.token_ids + model.tokenizer.encode(f"<|im_end|>\n<|im_start|>user\nand {turn}?<|im_end|>\n")


def test_a_shared_system_prompt_is_read_once(model):
    shared = length(model, f"<|im_start|>system\n{SYSTEM['content'].strip()}<|im_end|>\n")
    results = [model.chat([SYSTEM, user(f"{i} cats?")], max_new_tokens=2, **GREEDY) for i in range(20)]
    assert [r.cached_tokens for r in results] == [0] + [shared] * 19


def test_a_changed_last_message_and_branches_resume_before_it(model):
    def ask(*messages):
        return model.chat(list(messages), max_new_tokens=2, **GREEDY)

    said = [SYSTEM, user("one"), assistant("yes"), user("two"), assistant("no")]
    ask(*said, user("three"))
    before = model.prepare([*said, user("")]).token_ids
    header = length(model, "<|im_start|>user\n<|im_end|>\n" + HEADER)
    edited = ask(*said, user("four"))
    assert edited.cached_tokens == len(before) - header
    branch = ask(*said[:3], user("two and a half"))
    before = model.prepare([*said[:3], user("")]).token_ids
    assert branch.cached_tokens == len(before) - header
    assert ask(*said, user("three")).cached_tokens == ask(*said, user("three")).prompt_tokens


def test_inside_a_long_message_checkpoints_are_kept_too(model, cold):
    text = "the cat sat on the mat and " * 20
    model.generate(text, max_new_tokens=1)
    tokens, logits, reading = run(model, text[: len(text) // 2] + "b")
    total = length(model, text[: len(text) // 2])
    assert reading.cached_tokens == (total // 32) * 32
    assert "differs at token" in reading.miss_reason
    assert np.array_equal(logits, run(cold, text[: len(text) // 2] + "b")[1])
    assert tokens


def test_token_ids_decide_not_blocks(model):
    for n in (1, 2, 5, 127, 128, 129):
        ids = list(range(100, 100 + n % 100)) + [7] * (n - n % 100)
        model.generate(ids, max_new_tokens=1)
        assert model.generate(ids, max_new_tokens=1).cached_tokens == n


# ------------------------------------------------------------------------------- pictures


def test_other_pictures_are_other_prompts(model, cold):
    def ask(m, *images):
        return run(m, m.prepare([user("what?", *images)]))

    _, first, _ = ask(model, picture(0))
    _, other, reading = ask(model, picture(1))
    assert reading.cached_tokens == 0
    assert reading.miss_reason.startswith("the prompt differs at token")
    assert not np.array_equal(first, other)
    assert np.array_equal(ask(model, picture(0))[1], first)
    assert np.array_equal(other, ask(cold, picture(1))[1])
    _, two, _ = ask(model, picture(0), picture(1, 40))
    assert np.array_equal(two, ask(cold, picture(0), picture(1, 40))[1])


def test_pictures_are_encoded_once(model, monkeypatch):
    seen = []
    forward = model._runner.vision.forward
    monkeypatch.setattr(model._runner.vision, "forward", lambda images: seen.extend(images) or forward(images))
    model.chat([user("what?", picture(0), picture(1))], max_new_tokens=1)
    assert len(seen) == 2
    model.cache.clear()
    model.chat([user("and now?", picture(1), picture(2))], max_new_tokens=1)
    assert len(seen) == 3
    assert model._runner.features.nbytes > 0


def test_features_stay_within_their_budget():
    cache = FeatureCache(1000)
    for i in range(50):
        cache.put(str(i), np.zeros(50, np.float32))
        assert cache.nbytes <= 1000
        assert cache.get("0") is not None or i >= 5
        cache.get("1")
    assert cache.get("1") is not None  # used all the time
    assert cache.get("2") is None
    cache.put("huge", np.zeros(5000, np.float32))
    assert cache.get("huge") is None


# ------------------------------------------------------------------------------- budget


def checkpoint(model, ids, *, generated=False):
    state = model.new_state()
    model.forward(ids, state)
    keys = np.array(ids, np.int64)
    return Checkpoint(keys, PrefixDigest(keys)(len(keys)), state, np.zeros((1, 64), np.float32), generated)


def test_the_budget_holds_and_the_least_used_go_first(load):
    model = load(0)
    made = [checkpoint(model, [i, 1, 2]) for i in range(8)]
    size = sum(buffer.nbytes for buffer in made[0].buffers())
    cache = PrefixCache(3 * size + 10)

    def has(i):
        return cache.find(made[i].keys, lambda c: True).checkpoint is made[i]

    for i in range(3):
        cache.add(made[i])
    assert (len(cache), cache.nbytes) == (3, 3 * size)
    assert has(0)
    cache.add(made[3])
    assert (len(cache), cache.nbytes) == (3, 3 * size)
    assert [has(i) for i in range(4)] == [True, False, True, True]
    reason = cache.find(made[1].keys, lambda c: True).miss_reason
    assert reason == "the checkpoint at token 3 was dropped to stay within cache_bytes"
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    tiny = PrefixCache(size - 1)
    tiny.add(made[0])
    assert (len(tiny), tiny.nbytes) == (0, 0)


def test_shared_blocks_count_once(model):
    model.generate([5] * 300, max_new_tokens=1, **GREEDY)
    assert len(model.cache) == 300 // 32 + 1
    model.generate([5] * 300 + [6] * 200, max_new_tokens=1, **GREEDY)
    entries = list(model.cache._entries.values())
    alone = sum(buffer.nbytes for entry in entries for buffer in entry.buffers())
    together = sum({id(buffer): buffer.nbytes for entry in entries for buffer in entry.buffers()}.values())
    assert model.cache.nbytes == together < alone


def test_a_random_load_keeps_to_the_budget(load, rng):
    model = load(600_000)
    budget, peak = model.cache.budget, 0
    largest = 0
    for _ in range(30):
        head = [int(rng.integers(5))] * int(rng.integers(1, 200))
        model.generate(head + rng.integers(0, 256, int(rng.integers(1, 30))).tolist(), max_new_tokens=2)
        peak = max(peak, model.cache.nbytes)
        held = {id(b): b.nbytes for entry in model.cache._entries.values() for b in entry.buffers()}
        assert sum(held.values()) == model.cache.nbytes <= budget
        largest = max(largest, len(held))
    assert peak > budget / 2
    assert len(model.cache._holders) <= largest


def test_read_replaces_generated(load):
    model = load(0)
    cache = PrefixCache(1 << 30)
    generated, read = checkpoint(model, [1, 2, 3], generated=True), checkpoint(model, [1, 2, 3])
    for added, expected in ((generated, generated), (read, read), (generated, read)):
        cache.add(added)
        assert cache.find(read.keys, lambda c: True).checkpoint is expected
        assert len(cache) == 1


def test_adding_while_the_cache_is_busy_does_not_wait(load):
    """As when the garbage collector ends a stream in the middle of another method."""
    model = load(0)
    cache = PrefixCache(1 << 30)
    with cache._lock:
        cache.add(checkpoint(model, [1, 2]))
    assert len(cache) == 1


@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_wrong_budgets(load, value):
    with pytest.raises(ArgumentError, match="cache_bytes"):
        load(value)


def test_the_default_is_a_share_of_free_memory(load):
    from deltaic.machine import available_bytes

    model = load(None)
    assert 0 < model.info()["cache_bytes"] < available_bytes()


# ------------------------------------------------------------------------------- streams


def test_a_stream_closed_early_leaves_its_checkpoints(model):
    stream = model.stream([SYSTEM, user("what?")], max_new_tokens=50, **GREEDY)
    ids = [next(stream).token_id for _ in range(3)]
    prompt = model.prepare([SYSTEM, user("what?")]).token_ids.tolist()
    del stream
    gc.collect()
    assert run(model, prompt + ids)[2].cached_tokens == len(prompt) + 2


def test_threads_share_the_cache(model, cold):
    prompts = [model.prepare([SYSTEM, user(f"{i % 3} cats?")]) for i in range(9)]
    expected = [run(cold, prompt, 4)[0] for prompt in prompts[:3]]
    found = [None] * len(prompts)

    def work(i):
        found[i] = run(model, prompts[i], 4)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected * 3


def test_positions_made_by_hand_are_read_as_they_are(model, cold):
    prompt = model.prepare([SYSTEM, user("what?")])
    run(model, prompt)
    moved = type(prompt)(prompt.token_ids, [], prompt.position_ids * 2, 0, prompt.text)
    _, logits, reading = run(model, moved)
    assert (reading.cached_tokens, reading.miss_reason) == (0, "the positions of the prompt were made by hand")
    assert np.array_equal(logits, run(cold, moved)[1])
    assert not np.array_equal(logits, run(model, prompt)[1])


# ------------------------------------------------------------------------------- spill


def test_a_folder_takes_what_is_dropped_and_survives(load, tmp_path, monkeypatch):
    first = load(0)
    prompts = [[i] * 50 for i in range(6)]
    expected = [run(first, prompt)[1] for prompt in prompts]
    model = load(300_000, cache_folder=tmp_path)
    for prompt in prompts:
        run(model, prompt)
    assert len(model.cache) < 6
    for prompt, logits in zip(prompts, expected, strict=True):
        _, found, reading = run(model, prompt)
        assert reading.cached_tokens == 50
        assert np.array_equal(found, logits)
        assert model.cache.nbytes <= model.cache.budget
    model.cache.flush()
    files = {path.name for path in tmp_path.rglob("*.deltaic-state")}
    assert len(files) >= 6
    later = load(cache_folder=tmp_path)
    assert [run(later, prompt)[2].cached_tokens for prompt in prompts] == [50] * 6
    for path in tmp_path.rglob("*.deltaic-state"):  # damaged files are as good as not there
        path.write_bytes(path.read_bytes()[:-5])
    broken = load(cache_folder=tmp_path)
    assert [run(broken, prompt)[2].cached_tokens for prompt in prompts] == [0] * 6


def test_what_is_in_memory_goes_to_the_folder_when_the_process_ends(tiny_folder, device, tmp_path):
    code = (
        "import sys, deltaic\n"
        "model = deltaic.load(sys.argv[1], device=sys.argv[2], cache_folder=sys.argv[3], cache_bytes=64 << 20)\n"
        "model.generate([5] * 50, max_new_tokens=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(deltaic.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder), device, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not done.stderr
    later = deltaic.load(tiny_folder, device=device, cache_folder=tmp_path)
    assert later.generate([5] * 50, max_new_tokens=1).cached_tokens == 50


def test_the_folder_has_a_budget_too(load, tmp_path):
    model = load(300_000, cache_folder=tmp_path, cache_folder_bytes=1_000_000)
    for i in range(20):
        run(model, [i] * 50)
    model.cache.flush()
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.deltaic-state")]
    assert 0 < sum(sizes) <= 1_000_000


def test_folders_that_cannot_be_used(load, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "\0"):
        with pytest.raises(StateError, match="cache_folder"):
            load(cache_folder=folder)
    with pytest.raises(ArgumentError, match="cache_folder"):
        load(cache_folder=3)


# ------------------------------------------------------------------------------- context


def test_the_context_is_bounded_up_front(load, monkeypatch):
    model = load(context=64)
    assert model.context_length == 64
    with pytest.raises(deltaic.ContextLengthError, match="64"):
        model.generate([1] * 65)
    for wrong in (0, -1, 10**9, 1.5, "8"):
        with pytest.raises(ArgumentError, match="context"):
            load(context=wrong)
    monkeypatch.setattr("deltaic.memory.available_bytes", lambda: 500_000)
    with pytest.raises(ArgumentError, match=r"context: 2048 tokens need .* GB .* 0\.00 GB of memory is available"):
        load(context=2048)
    assert load(context=None).context_length == 2048


def test_a_prompt_that_goes_on_resumes_where_bits_allow_it(model, cold, ops):
    """Where cuts change no bits, at the very token where the last prompt ended; else at the last pause before it."""
    ids = list(range(70, 170))
    run(model, ids[:77])
    _, logits, reading = run(model, ids)
    assert reading.cached_tokens == (77 if ops.SPLIT_INVARIANT else 64)
    assert (reading.miss_reason is None) == ops.SPLIT_INVARIANT
    assert np.array_equal(logits, run(cold, ids)[1])
