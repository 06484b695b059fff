"""prepare: ids, pixels, grids and positions equal to transformers, placeholders counted, bad prompts refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_helpers import make_config, picture
from deltaic.chat.image import ImageProcessor
from deltaic.chat.prompt import Prompt, mrope_positions, prepare
from deltaic.chat.template import ChatTemplate
from deltaic.chat.tokenizer import Tokenizer
from deltaic.errors import ArgumentError, ConfigError, ImageError, PromptError
from PIL import Image
from test_image import SIZES
from test_template import CONVERSATIONS, TOOLS

PROCESSOR = ImageProcessor()
SMALL_TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}|{% endfor %}"
)


@pytest.fixture(scope="module")
def small(small_tokenizer: Tokenizer) -> Any:
    """prepare() for the small tokenizer; keyword arguments replace its parts."""

    def call(prompt: Any, **changes: Any) -> Prompt:
        parts = {
            "config": make_config(small_tokenizer), "tokenizer": small_tokenizer, "template": SMALL_TEMPLATE,
            "image_processor": PROCESSOR,
        }  # fmt: skip
        return prepare(prompt, **{**parts, **changes})

    return call


def positions_of_reference(model: Any, ids: Any, grids: Any, image_token_id: int) -> tuple[np.ndarray, int]:
    import torch

    ids = torch.as_tensor(np.asarray(ids))[None]
    positions, delta = model.get_rope_index(ids, (ids == image_token_id).int(), image_grid_thw=grids)
    return positions[:, 0].T.numpy(), int(delta)


def compare(
    messages: list[dict[str, Any]], processor: Any, model: Any, tokenizer: Tokenizer, template: ChatTemplate,
    *, tools: Any = None, thinking: bool | None = None,
) -> Prompt:  # fmt: skip
    """prepare(messages) against transformers' processor and position rule."""
    extra = {} if thinking is None else {"enable_thinking": thinking}
    expected = processor.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt", **extra
    )
    config = make_config(tokenizer)
    found = prepare(
        messages,
        config=config,
        tokenizer=tokenizer,
        template=template,
        image_processor=PROCESSOR,
        tools=tools,
        thinking=thinking,
    )
    assert found.token_ids.dtype == np.int64
    assert found.token_ids.tolist() == expected["input_ids"][0].tolist()
    if "pixel_values" in expected:
        np.testing.assert_array_equal(found.pixel_values, expected["pixel_values"].numpy())
        np.testing.assert_array_equal(found.grids, expected["image_grid_thw"].numpy())
    else:
        assert found.pixel_values is None
        assert found.grids.shape == (0, 3)
    positions, delta = positions_of_reference(
        model, found.token_ids, expected.get("image_grid_thw"), config.image_token_id
    )
    np.testing.assert_array_equal(found.position_ids, positions)
    assert found.rope_delta == delta
    return found


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_picture_equals_transformers(
    height: int, width: int, reference_processor: Any, reference_model: Any, family_tokenizer: Tokenizer,
    family_template: ChatTemplate,
) -> None:  # fmt: skip
    image = Image.fromarray(picture(height, width, seed=height + width))
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": f"What is in this {height}x{width} picture?"},
    ]
    compare(
        [{"role": "user", "content": content}], reference_processor, reference_model, family_tokenizer, family_template
    )


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_many_pictures_equal_transformers(
    tools: Any, thinking: bool | None, reference_processor: Any, reference_model: Any, family_tokenizer: Tokenizer,
    family_template: ChatTemplate,
) -> None:  # fmt: skip
    first, second, third = (Image.fromarray(picture(*size)) for size in ((100, 300), (333, 250), (64, 64)))
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Look closely."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Before "},
                {"type": "image", "image": first},
                {"type": "image", "image": second},
                {"type": "text", "text": " after"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Two pictures."}], "reasoning_content": "one, two"},
        {"role": "user", "content": [{"type": "image", "image": third}, {"type": "text", "text": "And this? 日本 é"}]},
    ]  # fmt: skip
    found = compare(
        messages,
        reference_processor,
        reference_model,
        family_tokenizer,
        family_template,
        tools=tools,
        thinking=thinking,
    )
    assert len(found.images) == 3
    assert found.rope_delta < 0


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [None, False])
def test_text_equals_transformers(
    name: str, thinking: bool | None, reference_processor: Any, reference_model: Any, family_tokenizer: Tokenizer,
    family_template: ChatTemplate,
) -> None:  # fmt: skip
    found = compare(
        CONVERSATIONS[name],
        reference_processor,
        reference_model,
        family_tokenizer,
        family_template,
        tools=TOOLS,
        thinking=thinking,
    )
    assert found.rope_delta == 0


def test_raw_text_equals_transformers(
    reference_processor: Any, reference_model: Any, family_tokenizer: Tokenizer
) -> None:
    text = "A: <|vision_start|><|image_pad|><|vision_end|> B: <|vision_start|><|image_pad|><|vision_end|><|im_end|> end"
    images = [Image.fromarray(picture(90, 140)), Image.fromarray(picture(300, 80))]
    expected = reference_processor(text=[text], images=images, return_tensors="pt")
    config = make_config(family_tokenizer)
    found = prepare(text, config=config, tokenizer=family_tokenizer, image_processor=PROCESSOR, images=images)
    assert found.token_ids.tolist() == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(found.pixel_values, expected["pixel_values"].numpy())
    positions, delta = positions_of_reference(
        reference_model, found.token_ids, expected["image_grid_thw"], config.image_token_id
    )
    np.testing.assert_array_equal(found.position_ids, positions)
    assert found.rope_delta == delta
    assert found.text == text


# positions


def test_positions_by_hand() -> None:
    ids = np.array([5, 9, 9, 9, 9, 9, 9, 6, 7])
    found = mrope_positions(ids, [(2, 3)], 9)
    assert found.T.tolist() == [[0, 1, 1, 1, 1, 1, 1, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]


def test_pictures_without_text_between() -> None:
    apart = mrope_positions(np.array([9, 9, 9, 9, 5, 9, 9]), [(2, 2), (1, 2)], 9)
    together = mrope_positions(np.array([9, 9, 9, 9, 9, 9]), [(2, 2), (1, 2)], 9)
    assert together[4:].tolist() == (apart[5:] - 1).tolist()
    assert together[4:].tolist() == [[2, 2, 2], [2, 2, 3]]


def test_positions_continue(small: Any) -> None:
    images = [picture(64, 64), picture(64, 200)]
    text = "a<|image_pad|>b<|image_pad|>c"
    base, moved = (small(text, images=images, start_position=start) for start in (0, 1000))
    np.testing.assert_array_equal(moved.position_ids, base.position_ids + 1000)
    assert moved.rope_delta == base.rope_delta == base.position_ids.max() + 1 - len(base)
    first = small("a<|image_pad|>b", images=images[:1])
    following = small("<|image_pad|>c", images=images[1:], start_position=len(first) + first.rope_delta)
    np.testing.assert_array_equal(np.concatenate([first.position_ids, following.position_ids]), base.position_ids)
    assert first.rope_delta + following.rope_delta == base.rope_delta


@pytest.mark.parametrize(("ids", "grids"), [([9, 9, 5, 9, 9], [(2, 2)]), ([9, 9, 9], [(2, 2)]), ([9] * 5, [(2, 2)])])
def test_positions_refuse_wrong_runs(ids: list[int], grids: list[tuple[int, int]]) -> None:
    with pytest.raises(PromptError, match="placeholders"):
        mrope_positions(np.array(ids), grids, 9)


# placeholders and pictures


def test_ids_with_single_and_expanded_placeholders(small: Any, small_tokenizer: Tokenizer) -> None:
    images = [picture(64, 64), picture(300, 80)]
    once = small_tokenizer.encode("x<|image_pad|>y<|image_pad|>")
    first = small(once, images=images)
    assert len(first) == 2 + sum(image.num_tokens for image in first.images)
    again = small(first.token_ids, images=first.images)
    np.testing.assert_array_equal(again.token_ids, first.token_ids)
    np.testing.assert_array_equal(again.position_ids, first.position_ids)
    assert small(np.array(once, np.int32), images=images).token_ids.tolist() == first.token_ids.tolist()
    assert small(first) is first
    with pytest.raises(PromptError, match="placeholders"):
        small(first.token_ids[:-1], images=first.images)


def test_images_go_before_the_last_user_message(small: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(64, 300)}, {"type": "text", "text": "A"}]},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": [{"type": "image", "image": picture(300, 64)}]},
    ]
    found = small(messages, images=picture(64, 64))
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    assert found.text == f"user:{pad}A|assistant:B|user:{pad}C|assistant:{pad}|"
    assert [grid[1] > grid[2] for grid in found.grids] == [False, False, True]
    assert found.grids[1][1] == found.grids[1][2]
    assert messages[2] == {"role": "user", "content": "C"}
    assert small([{"role": "user", "content": "C"}], images=[picture(64, 64)] * 2).text == f"user:{pad}{pad}C|"
    with pytest.raises(PromptError, match="expected a user message"):
        small([{"role": "assistant", "content": "C"}], images=picture(64, 64))


def test_images_fill_parts_without_data(small: Any) -> None:
    wide, tall = picture(64, 300), picture(300, 64)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": wide}, {"type": "image"}]}]
    found = small(messages, images=[tall, tall])
    assert [grid[1] > grid[2] for grid in found.grids] == [True, False, True]
    for images in (None, [tall], [tall] * 3):
        with pytest.raises(PromptError, match="expected 2, one for each image part without data"):
            small(messages, images=images)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("no place", 1, "found 0 and 1; write <|vision_start|>"),
        ("<|image_pad|>", 0, "found 1 and 0; give a picture"),
        ("<|image_pad|><|image_pad|>", 1, "found 2 and 1"),
        ("<|image_pad|>", 2, "found 1 and 2"),
        ("<|video_pad|>", 0, "videos are not supported"),
        ([{"role": "user", "content": "see <|image_pad|>"}], 0, "found 1 and 0"),
        ([{"role": "user", "content": "see <|image_pad|>"}], 1, "found 2 and 1"),
        ("", 0, "at least one token"),
        ("", 1, "at least one token"),
        ([], 0, "at least one token"),
        (np.array([], np.int64), 0, "at least one token"),
    ],
)  # fmt: skip
def test_placeholder_counts(small: Any, prompt: Any, count: int, message: str) -> None:
    with pytest.raises(PromptError, match=message.replace("|", r"\|")):
        small(prompt, images=[picture(64, 64)] * count)


def test_a_template_that_drops_pictures(small: Any) -> None:
    with pytest.raises(PromptError, match="found 0 and 1"):
        small([{"role": "user", "content": "x"}], images=picture(64, 64), template=ChatTemplate("nothing"))


@pytest.mark.parametrize(
    "prompt",
    [
        [1, -1], [1, 10**6], [1, 10**30], [1.0, 2.0], [True, False], [1, True], [1, None], ["1"], [[1, 2], [3]],
        [[1, 2]],
        np.array([1.5]), np.array([[1]]), np.array([True]), np.array(3), np.array([2**63], np.uint64), np.array(["a"]),
        np.array([1, None], object), [1, {"role": "user"}], {"role": "user", "content": "x"}, b"bytes", 3, None, {1, 2},
        [float("nan")], "lone \udc80",
    ],
)  # fmt: skip
def test_bad_prompts(small: Any, prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"expected"):
        small(prompt)


def test_ids_at_the_border(small: Any, small_tokenizer: Tokenizer) -> None:
    size = make_config(small_tokenizer).text.vocab_size
    assert small([0, size - 1]).token_ids.tolist() == [0, size - 1]
    with pytest.raises(PromptError, match=f"from 0 to {size - 1}, found {size} at index 1"):
        small([0, size])


def test_bad_arguments(small: Any) -> None:
    for start in (-1, 1.5, True, "0"):
        with pytest.raises(ArgumentError, match="start_position"):
            small("x", start_position=start)
    for extra in ({"thinking": True}, {"tools": TOOLS}, {"template_variables": {}}):
        with pytest.raises(ArgumentError, match="only for messages"):
            small("x", **extra)
    with pytest.raises(ArgumentError, match="beside a Prompt"):
        small(small("x"), images=picture(64, 64))
    with pytest.raises(ImageError, match="no such file"):
        small("<|image_pad|>", images="/no/such/file.png")
    with pytest.raises(PromptError, match="no chat template"):
        small([{"role": "user", "content": "x"}], template=None)


def test_text_only_models(small: Any, small_tokenizer: Tokenizer) -> None:
    config = make_config(small_tokenizer, vision=False)
    found = small("a<|image_pad|>b", config=config, image_processor=None)
    assert found.position_ids.tolist() == [[i] * 3 for i in range(3)]
    with pytest.raises(PromptError, match="no vision tower"):
        small("a<|image_pad|>b", config=config, images=picture(64, 64))


def test_without_a_tokenizer(small: Any, small_tokenizer: Tokenizer) -> None:
    ids = small_tokenizer.encode("a<|image_pad|>b")
    found = small(ids, tokenizer=None, images=picture(64, 64))
    assert found.text == ""
    np.testing.assert_array_equal(found.token_ids, small(ids, images=picture(64, 64)).token_ids)
    for prompt in ("text", [{"role": "user", "content": "x"}]):
        with pytest.raises(ConfigError, match=r"tokenizer\.json: expected one"):
            small(prompt, tokenizer=None)


def test_parts_that_do_not_fit_together(small: Any, small_tokenizer: Tokenizer) -> None:
    text, image = "<|image_pad|>", picture(64, 64)
    config = make_config(small_tokenizer)
    config.vision.patch_size = 14
    with pytest.raises(ConfigError, match="patch_size: expected 14"):
        small(text, images=image, config=config)
    config = make_config(small_tokenizer)
    config.image_token_id = 3
    with pytest.raises(ConfigError, match="image_token_id"):
        small(text, images=image, config=config)
    config = make_config(small_tokenizer)
    config.text = SimpleNamespace(vocab_size=4)
    with pytest.raises(ConfigError, match="do not belong together"):
        small("text", config=config)
    with pytest.raises(PromptError, match="without image preprocessing"):
        small(text, images=image, image_processor=None)


def test_pixel_limits_of_one_call(small: Any) -> None:
    few = small("<|image_pad|>", images=picture(300, 300), min_pixels=1024, max_pixels=64 * 64)
    many = small("<|image_pad|>", images=picture(300, 300))
    assert few.images[0].num_tokens == 4 < many.images[0].num_tokens
