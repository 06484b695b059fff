"""The whole model through device="cuda" in the emulator: the same answers as on the CPU."""

from __future__ import annotations

import deltaic
import numpy as np
import pytest
from helpers import array

PROMPT = "the cat sat on the mat"


@pytest.fixture
def pair(model_device, tiny_folder, request):
    """The tiny checkpoint on the device and on the CPU, in one dtype."""
    dtype = request.param
    return (
        deltaic.load(tiny_folder, device="cuda", dtype=dtype),
        deltaic.load(tiny_folder, device="cpu", dtype=dtype),
        dtype,
    )


def picture():
    x = np.arange(64 * 64 * 3) % 251
    return x.reshape(64, 64, 3).astype(np.uint8)


@pytest.mark.parametrize("pair", ["f32", "bf16"], indirect=True)
def test_logits_are_those_of_the_cpu(pair):
    model, cpu, dtype = pair
    found, expected = model.forward(PROMPT), cpu.forward(PROMPT)
    assert found.dtype == np.float32
    relative = np.abs(found - expected).max() / np.abs(expected).max()
    assert relative <= (1e-4 if dtype == "f32" else 2e-2), relative


@pytest.mark.parametrize("pair", ["f32"], indirect=True)
def test_greedy_tokens_are_those_of_the_cpu(pair):
    """Text and a picture; decoding goes through the graph's buffers, token by token."""
    model, cpu, _ = pair
    for options in ({}, {"images": [picture()]}):
        asked = {"max_new_tokens": 6, "temperature": 0.0, **options}
        assert model.chat("the dog", **asked).token_ids == cpu.chat("the dog", **asked).token_ids


@pytest.mark.parametrize("pair", ["bf16"], indirect=True)
def test_graph_step_is_the_plain_step(pair):
    """Bit for bit, across the border of a K/V block, and for two states in turn."""
    model, _, _ = pair
    ids = [int(i) for i in np.arange(135) % 250]
    plain, stepped, other = model.new_state(), model.new_state(), model.new_state()
    for state in (plain, stepped):
        model.forward(ids[:126], state)
    model.forward(ids[:5], other)
    for token in ids[126:130]:
        expected = model.forward([token], plain)[0]
        found = array(model._runner.logits(model._runner.step(token, stepped)))[0]
        np.testing.assert_array_equal(found, expected)
        model._runner.step(token, other)
    assert stepped.length == 130
    assert stepped.token_ids == plain.token_ids
    twin = stepped.fork()
    model._runner.step(7, twin)
    assert (stepped.length, twin.length) == (130, 131)
    np.testing.assert_array_equal(array(stepped.delta), array(plain.delta))


@pytest.mark.parametrize("pair", ["bf16"], indirect=True)
def test_sampling_and_penalties_run_on_the_device(pair):
    model, _, _ = pair
    asked = {"max_new_tokens": 5, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "presence_penalty": 1.0, "seed": 3}
    first = model.generate(PROMPT, logprobs=2, **asked)
    assert first.token_ids == model.generate(PROMPT, **asked).token_ids
    assert len(first.logprobs) == len(first.token_ids)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_folder_packed_for_the_cpu_loads(model_device, tiny_folder, tmp_path, dtype):
    """Repacked at load: the same numbers as packing the checkpoint for the GPU."""
    packed = deltaic.quantize(tiny_folder, tmp_path / "packed", dtype=dtype)
    found = deltaic.load(packed, device="cuda").forward(PROMPT)
    expected = deltaic.load(tiny_folder, device="cuda", dtype=dtype).forward(PROMPT)
    np.testing.assert_array_equal(found, expected)
