"""The bundled miniature: right answers, and the greedy tokens of transformers in float32. No test knows its weights:
the questions are drawn by bench/miniature, and expected tokens come from transformers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import deltaic
import numpy as np
import pytest
from deltaic import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_quality
from bench_quality import questions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deltaic._core") is None, reason="deltaic._core is not built")

PICTURES = {
    "two": "a purple star on the right and an orange cross at the bottom right",
    "three": "an orange square at the top, a blue star on the left and a blue square in the centre",
    "wide": "a yellow triangle at the top, a yellow square on the left and a green square at the bottom right",
}
DOCUMENTS = (
    "Monday, Tuesday, Wednesday, Thursday, Friday,",
    "K, L, M, N, O, P, Q, R,",
    "red, green, blue, yellow, purple, orange, red, green,",
    "Eva sees the red lamp near the boat. The quiet fox likes the old hat. Eva sees the red lamp",
)
TOKENS = 200
NEAR_TIE = 2e-2  # of the largest logit: the bound of a bfloat16 model's logits, issue and architecture page


@pytest.fixture(scope="module")
def model() -> deltaic.Model:
    return deltaic.load(cli.MINIATURE, dtype="bf16")


@pytest.fixture(scope="module")
def reference():
    from transformers import Qwen3_5MoeForConditionalGeneration

    return Qwen3_5MoeForConditionalGeneration.from_pretrained(cli.MINIATURE, dtype="float32").eval()


def logits_of(reference, model, prompt, tokens):
    """transformers' logits [len(tokens), words] after the prompt and after each of `tokens` but the last."""
    import torch

    ids = torch.tensor([[*prompt.token_ids.tolist(), *tokens[:-1]]])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        arguments["pixel_values"] = torch.tensor(prompt.pixel_values)
        arguments["image_grid_thw"] = torch.tensor(prompt.grids)
        arguments["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = reference(**arguments).logits[0]
    return logits[len(prompt) - 1 :, : model.tokenizer.vocab_size].numpy()


def differences(logits, tokens):
    """How far each token that is not the first choice lies below it, in parts of the largest logit.

    No difference means that greedy decoding with these logits gives the same tokens: each is the first choice after
    the prompt and the tokens before it.
    """
    chosen = logits[np.arange(len(tokens)), tokens]
    gaps = (logits.max(axis=1) - chosen) / np.abs(logits).max()
    return gaps[logits.argmax(axis=1) != tokens].tolist()


@pytest.mark.parametrize("text", DOCUMENTS)
def test_200_greedy_tokens_equal_transformers_in_float32(model, reference, text):
    prompt = model.prepare(text)
    result = model.generate(prompt, temperature=0.0, max_new_tokens=TOKENS)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == TOKENS
    assert differences(logits_of(reference, model, prompt, result.token_ids), result.token_ids) == []


@pytest.mark.parametrize("name", PICTURES)
def test_greedy_tokens_after_a_picture_equal_transformers_in_float32(model, reference, name):
    """The answer exactly; then on past the end token, where nothing was trained and ties are near."""
    picture = {"type": "image", "image": cli.MINIATURE / "pictures" / f"{name}.png"}
    content = [picture, {"type": "text", "text": "Describe the picture."}]
    prompt = model.prepare([{"role": "user", "content": content}])
    words, state, tokens, feed = model.tokenizer.vocab_size, model.new_state(), [], prompt
    while len(tokens) < TOKENS:
        tokens.append(int(model.forward(feed, state)[-1, :words].argmax()))
        feed = [tokens[-1]]
    logits = logits_of(reference, model, prompt, tokens)
    answer = 1 + next(i for i, token in enumerate(tokens) if token in model.end_ids)
    assert answer > 10
    assert differences(logits[:answer], tokens[:answer]) == []
    others = differences(logits, tokens)
    print(f"{name}: {len(others)} of {TOKENS} tokens differ, by {others} of the largest logit")
    assert len(others) <= TOKENS // 50
    assert max(others, default=0.0) < NEAR_TIE


@pytest.mark.parametrize("name", PICTURES)
def test_demo_describes_the_bundled_pictures(name, capsys):
    path = cli.MINIATURE / "pictures" / f"{name}.png"
    assert cli.main(["demo", "--image", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"answer:   The picture shows {PICTURES[name]}.\n")


@pytest.mark.parametrize(("dtype", "least"), [("bf16", 0.94), ("int8", 0.93), ("int4", 0.90)])
def test_answers_about_new_pictures(dtype, least):
    """A sample of the questions of bench/bench_quality.py, which gives the figures; 12 of each kind."""
    examples = questions.all_examples(1, per_kind=12, text_count=20)
    verdicts = bench_quality.accuracy(dtype, examples)
    assert sum(verdicts) / len(verdicts) >= least, questions.table(examples, verdicts)
