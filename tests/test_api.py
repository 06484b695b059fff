"""The public face end to end, on a tiny random checkpoint: against transformers, and against misuse."""

from __future__ import annotations

import dataclasses
import gc
import io
import math
import shutil
import struct
import threading
import weakref
import zlib

import deltaic
import numpy as np
import pytest
import tiny
from deltaic import (
    ArgumentError,
    CheckpointError,
    ContextLengthError,
    DeltaicError,
    DeviceError,
    PromptError,
    State,
    StateError,
)
from deltaic.generate import prefix
from deltaic.model.replay import Replay
from tiny import picture

PROMPT = "the cat sat on the mat and the dog"
QUESTION = [{"role": "user", "content": "What is on the sofa?"}]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "presence_penalty": 0.0}


def encoded(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def with_pictures(*pictures):
    parts = []
    for i, image in enumerate(pictures):
        parts += [{"type": "text", "text": f"picture {i}: "}, {"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is different?"}]}]


def largest_difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# ------------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def reference(tiny_folder):
    from transformers import Qwen3_5ForConditionalGeneration

    return Qwen3_5ForConditionalGeneration.from_pretrained(tiny_folder, dtype="float32").eval()


def inputs(model, prompt):
    """The prompt as transformers wants it."""
    import torch

    ids = torch.tensor(prompt.token_ids)[None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        arguments["pixel_values"] = torch.tensor(prompt.pixel_values)
        arguments["image_grid_thw"] = torch.tensor(prompt.grids)
        arguments["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return arguments


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_logits_equal_transformers(tiny_model, reference, pictures):
    import torch

    prompt = tiny_model.prepare(with_pictures(*(picture(i, 70 + 40 * i) for i in range(pictures))))
    with torch.no_grad():
        expected = reference(**inputs(tiny_model, prompt)).logits[0].numpy()
    found = tiny_model.forward(prompt)
    assert found.shape == (len(prompt), tiny_model.config.text.vocab_size)
    assert found.dtype == np.float32
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("pictures", [0, 2])
def test_greedy_tokens_equal_transformers(tiny_model, reference, pictures):
    import torch

    images = [picture(i, 70 + 40 * i) for i in range(pictures)]
    prompt = tiny_model.prepare(with_pictures(*images))
    vocabulary = tiny_model.config.text.vocab_size
    with torch.no_grad():
        expected = reference.generate(
            **inputs(tiny_model, prompt),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=sorted(tiny_model.end_ids),
            pad_token_id=0,
            suppress_tokens=[
                *range(tiny_model.tokenizer.vocab_size, vocabulary),
                *(tiny_model.config.image_token_id, tiny_model.config.video_token_id),
            ],
        )[0, len(prompt) :].tolist()
    found = tiny_model.generate(prompt, max_new_tokens=60, **GREEDY)
    assert found.token_ids == expected
    assert found.prompt_tokens == len(prompt)
    assert found.completion_tokens == len(expected)


# ------------------------------------------------------------------------------- prompt, state, forward


def test_a_prompt_may_be_split_anywhere(tiny_model):
    prompt = tiny_model.prepare(with_pictures(picture()))
    ids = prompt.token_ids.tolist()
    tail = tiny_model.prepare("the dog sat on the mat").token_ids.tolist()
    state = tiny_model.new_state()
    one = np.concatenate([tiny_model.forward(prompt, state), tiny_model.forward(tail, state)])
    assert state.length == len(ids) + len(tail)
    assert state.token_ids == ids + tail
    for cut in (1, 3, len(tail) - 1):
        state = tiny_model.new_state()
        parts = [tiny_model.forward(p, state) for p in (prompt, tail[:cut], tail[cut:])]
        assert largest_difference(np.concatenate(parts), one) < 1e-4


def test_a_picture_may_come_after_a_state(tiny_model):
    """A later turn with a new picture equals the one-shot prompt: positions go on where the state stands."""
    both = tiny_model.prepare(with_pictures(picture(1), picture(2, 110, 64)))
    cut = both.text.index("picture 1")
    first = tiny_model.prepare(both.text[:cut], images=[picture(1)])
    second = tiny_model.prepare(both.text[cut:], images=[picture(2, 110, 64)])
    assert first.token_ids.tolist() + second.token_ids.tolist() == both.token_ids.tolist()
    state = tiny_model.new_state()
    found = np.concatenate([tiny_model.forward(first, state), tiny_model.forward(second, state)])
    assert largest_difference(found, tiny_model.forward(both)) < 1e-4


def test_long_prompts_are_fed_in_chunks(tiny_model, monkeypatch):
    """Chunks end 16, 32, ... tokens after a message border, wherever the feeding starts."""
    ids = tiny_model.prepare(QUESTION).token_ids.tolist()
    border = ids.index(tiny_model.tokenizer.id_of("<|im_end|>")) + 2
    whole = tiny_model.forward(ids)
    sizes = []
    forward = tiny_model._runner.text.forward
    monkeypatch.setattr(
        tiny_model._runner.text, "forward", lambda x, *a, **k: sizes.append(len(x)) or forward(x, *a, **k)
    )
    monkeypatch.setattr(prefix, "PREFILL_TOKENS", 16)
    ends = [*range(16, border, 16), border, *range(border + 16, len(ids), 16), len(ids)]
    chunked = tiny_model.forward(ids)
    assert np.cumsum(sizes).tolist() == ends
    assert largest_difference(chunked, whole) < 1e-4
    for cut in (5, border - 1, border, border + 3):
        state = tiny_model.new_state()
        tiny_model.forward(ids[:cut], state)
        sizes.clear()
        tiny_model.forward(ids[cut:], state)
        assert (np.cumsum(sizes) + cut).tolist() == [end for end in ends if end > cut]


def test_keys_and_values_follow_the_dtype(tiny_folder, device):
    for dtype, kv_dtype, expected in (
        ("f32", None, "f32"),
        ("bf16", None, "bf16"),
        ("bf16", "f32", "f32"),
        ("bf16", "int8", "int8"),
    ):
        model = deltaic.load(tiny_folder, device=device, dtype=dtype, kv_dtype=kv_dtype)
        assert model.new_state().kv_dtype == expected


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_sketch_of_the_head_is_made_where_it_pays(tiny_folder, dtype, monkeypatch):
    """That it chooses the same tokens is tested on larger heads, in ops/test_screen.py and model/test_text.py."""
    options = {"dtype": dtype, "cache_bytes": 0}
    assert deltaic.load(tiny_folder, **options).info()["screen_bytes"] == 0  # such a head stays in the caches
    monkeypatch.setattr("deltaic.loading.SCREENED_BYTES", 0)
    assert deltaic.load(tiny_folder, screen=False, **options).info()["screen_bytes"] == 0
    model = deltaic.load(tiny_folder, **options)
    model.generate("the cat", max_new_tokens=1)
    assert model.info()["screen_bytes"] == 0  # the first token does not wait for it
    model.generate("the cat", max_new_tokens=2, speculate="off")
    assert (model.info()["screen_bytes"] > 0) == (dtype != "int4")


def test_info_tells_what_was_loaded(tiny_model, device):
    info = tiny_model.info()
    assert info["device"] == device
    assert info["layers"] == info["delta_layers"] + info["attention_layers"] == 4
    assert info["vision"] is True
    assert info["context_length"] == tiny.CONTEXT
    assert info["weight_bytes"] > 0


# ------------------------------------------------------------------------------- generation


def test_streaming_equals_not_streaming(tiny_model):
    options = {**SAMPLED, "seed": 11, "max_new_tokens": 80, "logprobs": 2}
    stream = tiny_model.stream(QUESTION, **options)
    pieces = list(stream)
    result = tiny_model.chat(QUESTION, **options)
    assert "".join(p.text for p in pieces if not p.reasoning) == result.text == stream.result.text
    assert [p.token_id for p in pieces if p.token_id is not None] == result.token_ids == stream.result.token_ids
    assert [p.logprobs for p in pieces if p.logprobs] == result.logprobs
    assert result.completion_tokens == len(result.token_ids) == len(result.logprobs)
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert result.time_to_first_token > 0
    assert result.tokens_per_second > 0


def test_streamed_text_never_holds_half_a_character(tiny_model):
    """A random byte-level model writes broken UTF-8 all the time: only whole sequences may be replaced."""
    result = tiny_model.generate(PROMPT, max_new_tokens=300, seed=5, **SAMPLED)
    assert result.text == tiny_model.tokenizer.decode([t for t in result.token_ids if t not in tiny_model.end_ids])


def test_seeds_reproduce(tiny_model):
    def tokens(seed):
        return tiny_model.generate(PROMPT, max_new_tokens=30, seed=seed, **SAMPLED).token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_ids_without_a_token_are_never_generated(tiny_model):
    assert tiny_model.tokenizer.vocab_size < tiny_model.config.text.vocab_size
    for seed in range(3):
        ids = tiny_model.generate(PROMPT, max_new_tokens=200, temperature=3.0, seed=seed, top_k=0).token_ids
        assert max(ids) < tiny_model.tokenizer.vocab_size


def test_placeholders_of_pictures_are_never_generated(tiny_model, monkeypatch):
    """Whatever the logits say: a placeholder that the model wrote would have no picture in the next turn."""
    config, rig = tiny_model.config, tiny_model._runner.logits

    def eager(hidden):
        logits = rig(hidden)
        logits[:, [config.image_token_id, config.video_token_id]] = 1e9
        return logits

    monkeypatch.setattr(tiny_model._runner, "logits", eager)
    ids = tiny_model.generate("the", max_new_tokens=20, temperature=0.0).token_ids
    assert not {config.image_token_id, config.video_token_id} & set(ids)


def test_length_ends_a_generation(tiny_model):
    result = tiny_model.generate([1, 2, 3], max_new_tokens=3, **GREEDY)
    assert (result.finish_reason, result.completion_tokens) == ("length", 3)


def scripted(monkeypatch, model, text, *, end=True):
    """Let the model say `text`, token by token, then an end token."""
    ids = model.tokenizer.encode(text) + [model.tokenizer.id_of("<|im_end|>")] * end
    monkeypatch.setattr("deltaic.api.generate_ids", lambda *args, **kwargs: iter([(i, None) for i in ids]))
    return ids


def test_an_end_token_stops_without_text(tiny_model, monkeypatch):
    ids = scripted(monkeypatch, tiny_model, "héllo 🙂")
    result = tiny_model.chat("hi")
    assert (result.text, result.finish_reason, result.stop_string) == ("héllo 🙂", "stop", None)
    assert result.token_ids == ids


@pytest.mark.parametrize(
    ("stop", "text"), [("mat", "the cat sat on the "), (["dog", "t on"], "the cat sa"), ("🙂", None)]
)
def test_stop_strings_across_token_borders(tiny_model, monkeypatch, stop, text):
    said = "the cat sat on the mat and the dog sat"
    ids = scripted(monkeypatch, tiny_model, said)
    result = tiny_model.chat("hi", stop=stop)
    assert result.text == (said if text is None else text)
    assert result.finish_reason == "stop"
    assert result.stop_string == (None if text is None else [stop, "t on"][isinstance(stop, list)])
    assert result.token_ids == ids[: len(result.token_ids)]
    assert "".join(p.text for p in tiny_model.stream("hi", stop=stop)) == result.text


def test_thinking_is_told_apart(tiny_model, monkeypatch):
    scripted(monkeypatch, tiny_model, "cats sit.\n</think>\n\nthe mat")
    stream = tiny_model.stream("where?", thinking=True, stop=["sit"])  # stop strings end answers, not thinking
    pieces = list(stream)
    assert "".join(p.text for p in pieces if p.reasoning) == stream.result.reasoning == "cats sit."
    assert "".join(p.text for p in pieces if not p.reasoning) == stream.result.text == "the mat"
    assert stream.result.finish_reason == "stop"
    plain = tiny_model.chat("where?", thinking=False)
    assert plain.reasoning is None
    assert plain.text == "cats sit.\n</think>\n\nthe mat"


def test_unfinished_thinking_has_no_answer(tiny_model, monkeypatch):
    scripted(monkeypatch, tiny_model, "cats sit", end=False)
    result = tiny_model.chat("where?", thinking=True)
    assert (result.reasoning, result.text, result.finish_reason) == ("cats sit", "", "length")


def test_defaults_come_from_the_checkpoint(tiny_model, tiny_folder, device, tmp_path):
    greedy = tiny_model.generate(PROMPT, max_new_tokens=20, **GREEDY).token_ids
    assert tiny_model.generate(PROMPT, max_new_tokens=20).token_ids == greedy  # do_sample: false
    folder = shutil.copytree(tiny_folder, tmp_path / "sampling")
    tiny.write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 2.0, "max_new_tokens": 7})
    model = deltaic.load(folder, device=device, dtype="f32")
    assert model.generate(PROMPT, seed=1, top_k=0).completion_tokens <= 7
    assert model.generate(PROMPT, seed=1, top_k=0, max_new_tokens=20).token_ids != greedy


# ------------------------------------------------------------------------------- stopping early, sharing


def test_closing_a_stream_frees_its_state_and_the_model_goes_on(tiny_model, monkeypatch):
    states = []
    new_state = tiny_model.new_state
    expected = tiny_model.generate(PROMPT, max_new_tokens=10, **GREEDY).token_ids

    class Tracked:  # State has slots and cannot be referred to weakly; its K/V table's owner can
        pass

    def tracking():
        state, mark = new_state(), Tracked()
        states.append(weakref.ref(mark))
        state.token_ids = type("Ids", (list,), {"mark": mark})()
        return state

    monkeypatch.setattr(tiny_model, "new_state", tracking)
    stream = tiny_model.stream([5, 6, 7], max_new_tokens=50, **GREEDY)
    first = next(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == [first.token_id]
    assert list(stream) == []
    monkeypatch.undo()
    del tracking
    gc.collect()
    assert [state() for state in states] == [None]
    assert tiny_model.generate(PROMPT, max_new_tokens=10, **GREEDY).token_ids == expected


def test_ctrl_c_while_computing(tiny_model, monkeypatch):
    expected = tiny_model.generate(PROMPT, max_new_tokens=10, **GREEDY).token_ids
    stream = tiny_model.stream(tiny_model.prepare(PROMPT), max_new_tokens=10, **GREEDY)
    pieces = [next(stream), next(stream)]

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.token_ids == [p.token_id for p in pieces] == expected[:2]
    assert tiny_model.generate(PROMPT, max_new_tokens=10, **GREEDY).token_ids == expected


def test_an_interrupted_forward_makes_its_state_unusable(tiny_model, monkeypatch):
    state = tiny_model.new_state()
    tiny_model.forward([1, 2], state)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_model._runner.text, "run_layers", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tiny_model.forward([3], state)
    with pytest.raises(StateError):
        tiny_model.forward([3], state)


def test_streams_interleave_in_one_thread(tiny_model):
    alone = [tiny_model.chat(q, max_new_tokens=15, **GREEDY).token_ids for q in ("one", "two")]
    streams = [tiny_model.stream(q, max_new_tokens=15, **GREEDY) for q in ("one", "two")]
    abandoned = tiny_model.stream("three", max_new_tokens=15, **GREEDY)
    next(abandoned)
    for _ in zip(*streams, strict=False):
        tiny_model.forward([1, 2, 3])
    for stream in streams:
        stream.finish()
    assert [stream.result.token_ids for stream in streams] == alone


def test_threads_share_a_model(tiny_model):
    questions = [f"question {i}" for i in range(4)]
    expected = [tiny_model.chat(q, max_new_tokens=15, **GREEDY).token_ids for q in questions]
    found = [None] * len(questions)

    def work(i):
        found[i] = tiny_model.chat(questions[i], max_new_tokens=15, **GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert found == expected


def test_a_stream_may_be_closed_from_another_thread(tiny_model):
    stream = tiny_model.stream("go on", max_new_tokens=1500, temperature=5.0, top_k=0, seed=1)
    begun, counted = threading.Event(), []

    def read():
        for piece in stream:
            counted.append(piece.token_id)
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    stream.close()
    reader.join(60)
    assert not reader.is_alive()
    assert len(counted) < 1500


def test_a_stream_has_one_reader(tiny_model, monkeypatch):
    stream = tiny_model.stream("hi", max_new_tokens=5)
    caught = []

    choose = tiny_model._ops.sample_rows

    def choose_and_read(*args, **kwargs):
        try:
            next(stream)
        except StateError as error:
            caught.append(error)
        choose(*args, **kwargs)

    monkeypatch.setattr(tiny_model._ops, "sample_rows", choose_and_read)
    next(stream)
    assert "one reader" in str(caught[0])


# ------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"temprature": 1}, "temprature"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "chat", "stream"])
def test_wrong_options_are_refused_at_the_call(tiny_model, options, name, call):
    with pytest.raises(ArgumentError, match=f"^{name}"):
        getattr(tiny_model, call)("hi", **options)


@pytest.mark.parametrize(
    "prompt",
    [
        "", [], None, 5, 1.5, b"text", {"role": "user"}, [[1, 2]], [1.5], [-1], [320], [10**30], [True], ["a"],
        [{"role": "user"}, 3], [{"content": "no role"}], "\ud800", np.zeros((2, 2), np.int64), np.array(["a"]),
        "one <|image_pad|> without a picture",
        [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}],
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used(tiny_model, prompt):
    for call in (tiny_model.generate, tiny_model.forward, tiny_model.prepare):
        with pytest.raises(PromptError):
            call(prompt)
    assert tiny_model.generate([1], max_new_tokens=1).completion_tokens == 1


@pytest.mark.parametrize("prompt", [None, [], [-1], {"role": "user"}, 5, b"hi", "", " \n"])
def test_messages_that_cannot_be_used(tiny_model, prompt):
    for call in (tiny_model.chat, tiny_model.stream):
        with pytest.raises(PromptError):
            call(prompt)


def test_pictures_that_cannot_be_used(tiny_model, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    header = struct.pack(">II", 50_000, 50_000) + b"\x08\x02\x00\x00\x00"  # a gigapixel PNG, but for its samples
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    (tmp_path / "truncated.png").write_bytes(encoded(picture())[:-200])
    files = [tmp_path / f"{name}.png" for name in ("empty", "text", "huge", "truncated", "missing")]
    for image in (
        *files,
        tmp_path,
        b"",
        b"\x89PNG",
        7,
        "data:image/png;base64,!",
        np.zeros((4, 4), int),
        picture(0, 1, 10_000),
    ):
        with pytest.raises(DeltaicError):
            tiny_model.chat("what?", images=[image])
    for image in (picture(), picture(0, 1, 1), encoded(picture())):
        assert tiny_model.chat("what?", images=[image], max_new_tokens=1).completion_tokens == 1


def test_the_context_is_a_limit_with_both_numbers(tiny_model):
    context = tiny_model.context_length
    for call in (tiny_model.generate, tiny_model.forward):
        with pytest.raises(ContextLengthError, match=rf"{context + 1} tokens.*{context}"):
            call([1] * (context + 1))
    with pytest.raises(ContextLengthError, match=rf"{context} tokens.*{context}"):
        tiny_model.generate([1] * context)
    with pytest.raises(ContextLengthError, match=rf"8 tokens.*{context}.*{context + 8}"):
        tiny_model.generate([1] * 8, max_new_tokens=context)
    full = tiny_model.generate([1] * (context - 2), temperature=1.0, seed=0)
    assert full.completion_tokens <= 2
    state = tiny_model.new_state()
    tiny_model.forward([1] * 8, state)
    with pytest.raises(ContextLengthError, match=rf"8 tokens.*{context}"):
        tiny_model.forward([1] * context, state)
    tiny_model.forward([1], state)


def test_states_that_do_not_fit(tiny_model):
    def of(**changes):
        return State(dataclasses.replace(tiny_model.config.text, **changes), tiny_model._ops)

    others = [of(linear_num_value_heads=8), of(head_dim=64), of(linear_value_head_dim=32), of(num_key_value_heads=1)]
    others.append(of(layer_types=("full_attention", *tiny_model.config.text.layer_types[1:])))
    for state in (1, "state", np.zeros(3), {}, *others):
        with pytest.raises(StateError, match="state"):
            tiny_model.forward([1], state)


def test_a_prompt_made_by_hand_is_checked(tiny_model):
    good = tiny_model.prepare(with_pictures(picture()))
    make = type(good)
    for ids, positions in (
        (good.token_ids[:-1], good.position_ids),
        (good.token_ids.astype(float), good.position_ids),
        (good.token_ids, good.position_ids[:, :2]),
        (good.token_ids * 0 - 1, good.position_ids),
        (good.token_ids * 0 + 1, good.position_ids),  # the picture has no placeholders
    ):
        with pytest.raises(PromptError):
            tiny_model.forward(make(ids, good.images, positions, good.rope_delta, ""))
    with pytest.raises(ArgumentError, match="thinking"):
        tiny_model.prepare(good, thinking=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"dtype": "fp8"}, ArgumentError),
        ({"dtype": 4}, ArgumentError),
        ({"dtype": {"default": "int4", "layers.99.*": "int8"}}, ArgumentError),
        ({"vision_dtype": "int5"}, ArgumentError),
        ({"activations": "bf16"}, ArgumentError),
        ({"memory": "huge"}, ArgumentError),
        ({"screen": "yes"}, ArgumentError),
        ({"kv_dtype": "fp8"}, ArgumentError),
        ({"device": "tpu"}, ArgumentError),
        ({"device": "cuda"}, DeviceError),
        ({"threads": 0}, ArgumentError),
        ({"threads": -1}, ArgumentError),
        ({"threads": 1.5}, ArgumentError),
        ({"threads": 10**9}, ArgumentError),
    ],
)
def test_wrong_arguments_of_load(tiny_folder, arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        deltaic.load(tiny_folder, **{"device": "reference", **arguments})


@pytest.mark.parametrize("path", ["/no/such/folder", "", "not an id", None, 5, "a/b/c", "../x", "\0"])
def test_models_that_are_not_there(path):
    with pytest.raises(DeltaicError):
        deltaic.load(path, device="reference")


def broken(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("generation_config.json", b'{"temperature": -1}'),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("chat_template.jinja", b"{% if %}"),
        ("chat_template.jinja", b"{{ raise_exception('no') }}"),
        ("preprocessor_config.json", b"[]"),
    ],
)
def test_broken_folders(tiny_folder, tmp_path, name, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    broken(folder, name, content)
    with pytest.raises(DeltaicError):
        deltaic.load(folder, device="reference").chat("what?", images=[picture()], max_new_tokens=1)


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        deltaic.load(folder, device="reference")


def test_weights_that_are_not_numbers_end_in_an_error(tiny_folder, device, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = deltaic.load(folder, device=device, dtype="f32")
    for _ in range(2):
        with pytest.raises(DeltaicError, match="NaN"):
            model.chat("hi")


def test_without_image_preprocessing_text_still_works(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "text")
    broken(folder, "preprocessor_config.json", None)
    model = deltaic.load(folder, device="reference")
    assert model.chat("what?", max_new_tokens=1).completion_tokens == 1
    with pytest.raises(PromptError, match=r"preprocessor_config\.json"):
        model.chat("what?", images=[picture()])


def test_token_ids_need_no_tokenizer(tiny_model, tiny_folder, device, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "ids")
    broken(folder, "tokenizer.json", None)
    model = deltaic.load(folder, device=device, dtype="f32")
    assert np.array_equal(model.forward([1, 2, 3]), tiny_model.forward([1, 2, 3]))
    with pytest.raises(DeltaicError, match=r"tokenizer\.json"):
        model.generate([1, 2, 3])


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_prompt_read_in_pieces_gives_the_same_bits(tiny_folder, tiny_moe_folder, device, ops, dtype, moe, rng):
    """On op sets that promise it: pieces of any size, wherever they begin."""
    if not ops.SPLIT_INVARIANT:
        pytest.skip("the op set does not promise it")
    model = deltaic.load(tiny_moe_folder if moe else tiny_folder, device=device, dtype=dtype, threads=2)
    prompt = model.prepare([{"role": "user", "content": "the cat sat " * 40}, *with_pictures(picture())])
    whole = np.concatenate(list(model._runner.hidden(prompt, model.new_state(), [len(prompt)])))
    for _ in range(6):
        cuts = rng.choice(np.arange(1, len(prompt)), int(rng.integers(1, 12)), replace=False)
        pauses = sorted({*cuts.tolist(), len(prompt)})
        parts = list(model._runner.hidden(prompt, model.new_state(), pauses))
        assert np.array_equal(np.concatenate(parts), whole)
