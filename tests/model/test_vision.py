"""The vision tower and whole prompts with pictures against transformers. Once per op set."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
import torch
from deltaic.errors import ImageError
from deltaic.model.state import State
from oracle import IMAGE_TOKEN, MOE, ODD_HEADS, Picture, build_text, build_vision, feed, max_error, random_picture

TOLERANCE = 1e-4
TEXT = {"dense": ODD_HEADS, "moe": MOE}

torch_model = functools.cache(lambda name: oracle.torch_vision_model(TEXT[name]))


@functools.cache
def tower_of(ops, dtype="f32"):
    return build_vision(torch_model("dense"), ops, dtype)


@torch.no_grad()
def torch_features(pictures):
    inputs = oracle.torch_pixels(pictures)
    visual = torch_model("dense").model.visual
    return visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.numpy()


# 7 x 7 learned positions: grids below, at and above that size; strips one block wide; odd numbers of blocks.
@pytest.mark.parametrize("grid", [(2, 2), (2, 10), (6, 2), (6, 6), (10, 14), (14, 10)])
def test_tower_matches_transformers(ops, rng, grid):
    picture = random_picture(rng, *grid)
    features = tower_of(ops).forward([picture])
    assert features.shape == (grid[0] * grid[1] // 4, ODD_HEADS["hidden_size"])
    assert max_error(features, torch_features([picture])) < TOLERANCE


def test_pictures_do_not_see_each_other(ops, rng):
    pictures = [random_picture(rng, 6, 10), random_picture(rng, 4, 2), random_picture(rng, 6, 6)]
    tower = tower_of(ops)
    features = tower.forward(pictures)
    assert max_error(features, torch_features(pictures)) < TOLERANCE
    assert max_error(features, np.concatenate([tower.encode(p) for p in pictures])) == 0
    assert tower.forward([]).shape == (0, ODD_HEADS["hidden_size"])


def test_bfloat16_tower_stays_close(ops, rng):
    picture = random_picture(rng, 6, 10)
    assert max_error(tower_of(ops, "bf16").forward([picture]), torch_features([picture])) < 2e-2


@pytest.mark.parametrize("name", list(TEXT))
def test_prompt_with_two_pictures(ops, rng, name):
    """Text before, between and after two pictures of different odd sizes; then four decoded tokens."""
    pictures = [random_picture(rng, 6, 10), random_picture(rng, 14, 2)]
    text = [rng.integers(0, 89, n) for n in (5, 3, 7, 4)]
    pads = [np.full(oracle.picture_tokens(p), IMAGE_TOKEN) for p in pictures]
    prompt = np.concatenate([text[0], pads[0], text[1], pads[1], text[2]])
    ids = np.concatenate([prompt, text[3]])
    hf, types = torch_model(name), torch.from_numpy((ids == IMAGE_TOKEN).astype(np.int32))[None]
    inputs = oracle.torch_pixels(pictures)
    expected = oracle.torch_logits(hf, ids, **inputs, mm_token_type_ids=types)
    positions, _ = hf.model.get_rope_index(torch.from_numpy(ids)[None], types, inputs["image_grid_thw"])
    positions = np.ascontiguousarray(positions[:, 0].numpy().T)

    model = build_text(hf, ops)
    x, state, n = model.embed(prompt), State(model.config, ops), len(prompt)
    x[prompt == IMAGE_TOKEN] = build_vision(hf, ops).forward(pictures)
    logits = [model.logits(model.forward(x, positions[:n], [state], np.array([0, n])))]
    for t in range(n, len(ids)):
        x = model.embed(ids[t : t + 1])
        logits.append(model.logits(model.forward(x, positions[t : t + 1], [state], np.array([0, 1]))))
    assert max_error(np.concatenate(logits), expected) < TOLERANCE
    assert max_error(feed(model, State(model.config, ops), ids), expected) > 0.1  # pictures matter


def test_pictures_that_do_not_fit_are_errors(ops, rng):
    good = random_picture(rng, 4, 6)
    for grid in [(1, 4, 5), (2, 4, 6), (1, 0, 6), (1, 6, 4), (1, -4, -6)]:
        with pytest.raises(ImageError, match="grid"):
            tower_of(ops).forward([Picture(good.pixels, grid)])
    with pytest.raises(ImageError, match="float64"):
        tower_of(ops).forward([Picture(good.pixels.astype(np.float64), good.grid)])
