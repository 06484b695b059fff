"""How does anything a user gives become a Prompt? Expanded token ids, pictures, and M-RoPE positions on three axes.

`prepare` is the one door: messages, raw text or token ids. Placeholders are counted here: every picture has its place,
and every place its picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import describe
from ..errors import ArgumentError, ConfigError, PromptError
from .image import ImageInput, ImageProcessor
from .template import BARE_IMAGE, ChatTemplate, clean_messages
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..model.config import ModelConfig

IMAGE_PLACEHOLDER = "<|image_pad|>"


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model reads.

    token_ids int64 [T]: placeholders expanded, one per vision feature. images: in the order of their placeholders.
    position_ids int64 [T, 3]: (time, height, width) of each token. rope_delta: by how much the next position differs
    from start_position + T (0 without pictures, else negative or 0); add it to that of the state the prompt continues.
    text: what was tokenised, with one placeholder per picture; decoded from the ids if ids were given
    (empty without a tokenizer).
    """

    token_ids: NDArray[np.int64]
    images: list[ImageInput] = field(default_factory=list)
    position_ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    rope_delta: int = 0
    text: str = ""

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, vocab_size: int) -> None:
        """Raise PromptError where its arrays are not as above, whatever its author did to it, or an id is not below
        `vocab_size`."""
        ids, positions = self.token_ids, self.position_ids
        for name, array, shape in (("token_ids", ids, (len(ids),)), ("position_ids", positions, (len(ids), 3))):
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.shape != shape:
                raise PromptError(f"{name}: expected an int64 array of shape {shape}, found {describe(array)}")
        if not len(ids):
            raise PromptError("the prompt is empty; expected at least one token")
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            raise PromptError(f"token {wrong[0]} is {ids[wrong[0]]}, expected an id from 0 to {vocab_size - 1}")

    @property
    def grids(self) -> NDArray[np.int64]:
        """Patches (time, height, width) of each picture, int64 [n, 3]: the reference's image_grid_thw."""
        return np.array([image.grid for image in self.images], np.int64).reshape(-1, 3)

    @property
    def pixel_values(self) -> NDArray[np.float32] | None:
        """Normalised patches of all pictures, float32 [P, 3 * temporal * patch * patch], or None without pictures.
        Made anew each time."""
        return np.concatenate([image.pixel_values() for image in self.images]) if self.images else None


def prepare(
    prompt: str | Sequence[int] | NDArray[np.integer] | Sequence[Mapping[str, Any]] | Prompt,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None = None,
    image_processor: ImageProcessor | None = None,
    thinking: bool | None = None,
    images: Any = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    start_position: int = 0,
    merge_system: bool = True,
    template_variables: Mapping[str, Any] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Prompt:
    """Make a Prompt of messages (list of dicts), raw text (str; special tokens in it count as such) or token ids (whole
    numbers).

    tokenizer: None will do for ids. images: one picture or a list of them. In messages they fill the image parts
    without data, in order; without such parts they go before the text of the last user message. In raw text and ids
    each belongs to one `<|image_pad|>`, in order; ids may also hold them already expanded. thinking, tools,
    merge_system, template_variables: see ChatTemplate.render; only for messages. start_position: position of the first
    token, for a prompt that continues a sequence. min_pixels, max_pixels: see ImageProcessor.process.

    Raises PromptError (empty, ids out of range, placeholders that do not match the pictures, template errors),
    ImageError, ArgumentError, and ConfigError if tokenizer, image processor and model do not fit together."""
    if isinstance(start_position, bool) or not isinstance(start_position, (int, np.integer)) or start_position < 0:
        raise ArgumentError(f"start_position: expected a whole number from 0, found {start_position!r}")
    given = _image_list(images)
    if isinstance(prompt, Prompt):
        if given:
            raise ArgumentError(
                "images: expected none beside a Prompt, which holds its own; pass images= when preparing it"
            )
        return prompt
    is_messages = _is_messages(prompt)
    if not is_messages and (tools is not None or thinking is not None or template_variables is not None):
        raise ArgumentError(
            "thinking, tools and template_variables: only for messages; raw text and ids pass no chat template"
        )

    if is_messages:
        if template is None:
            raise PromptError("messages: this model has no chat template; give plain text to generate() instead")
        messages, sources = clean_messages(prompt, merge_system=merge_system)
        sources = _place_images(messages, sources, given)
        text = template.render_clean(messages, thinking=thinking, tools=tools, variables=template_variables)
        ids = _encoded(text, tokenizer, config)
    elif isinstance(prompt, str):
        text, sources = prompt, given
        ids = _encoded(text, tokenizer, config)
    else:
        sources = given
        ids = _checked_ids(prompt, config.text.vocab_size)
        text = tokenizer.decode(ids.tolist(), skip_special=False) if tokenizer else ""
    if not len(ids):
        raise PromptError("prompt: expected at least one token, found none; an empty text cannot be continued")

    placeholders = _count_placeholders(ids, len(sources), config, tokenizer)
    loaded = _load_images(sources, config, image_processor, min_pixels, max_pixels)
    counts = [image.num_tokens for image in loaded]
    if placeholders == len(loaded):
        ids = _expand(ids, counts, config.image_token_id)
    elif isinstance(prompt, str) or is_messages or placeholders != sum(counts):
        raise _mismatch(placeholders, len(sources))
    positions = mrope_positions(ids, [image.token_grid for image in loaded], config.image_token_id, int(start_position))
    delta = int(positions.max()) + 1 - int(start_position) - len(ids)
    return Prompt(ids, loaded, positions, delta, text)


def mrope_positions(
    token_ids: NDArray[np.int64], grids: Sequence[tuple[int, int]], image_token_id: int | None, start_position: int = 0
) -> NDArray[np.int64]:
    """Positions int64 [T, 3] of expanded `token_ids` int64 [T]; grids: (height, width) of each picture in tokens, in
    order.

    Text advances all axes by one a token. A picture at position p gives its token (y, x) the position (p, p + y, p +
    x) and advances by max(height, width). Pictures may follow each other directly: a run of placeholders is cut by
    grid sizes. Without grids, placeholders are text. Raises PromptError if the placeholders of a picture are missing
    or interrupted."""
    positions = np.empty((len(token_ids), 3), np.int64)
    places = np.flatnonzero(token_ids == image_token_id) if grids else np.empty(0, np.int64)
    if len(places) != sum(height * width for height, width in grids):
        needed = sum(height * width for height, width in grids)
        raise PromptError(
            f"prompt: expected {needed} image placeholders for {len(grids)} picture(s), found {len(places)}"
        )
    index, position, used = 0, start_position, 0
    for number, (height, width) in enumerate(grids):
        first, last = int(places[used]), int(places[used + height * width - 1])
        if last - first != height * width - 1:
            raise PromptError(
                f"prompt: expected {height * width} image placeholders in a row for picture {number}, "
                "found other tokens between them"
            )
        positions[index:first] = np.arange(position, position + first - index)[:, None]
        position += first - index
        block = positions[first : last + 1].reshape(height, width, 3)
        block[..., 0] = position
        block[..., 1] = position + np.arange(height)[:, None]
        block[..., 2] = position + np.arange(width)
        index, position, used = last + 1, position + max(height, width), used + height * width
    positions[index:] = np.arange(position, position + len(token_ids) - index)[:, None]
    return positions


def _is_messages(prompt: Any) -> bool:
    if isinstance(prompt, Mapping):
        raise PromptError("messages: expected a list of dicts, found one dict; put it into a list")
    if isinstance(prompt, (str, np.ndarray)):
        return False
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise PromptError(
            "prompt: expected messages (a list of dicts), text (a str) or token ids (whole numbers), "
            f"found {type(prompt).__name__}"
        )
    return len(prompt) > 0 and any(isinstance(item, Mapping) for item in prompt)


def _image_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _place_images(messages: list[dict[str, Any]], sources: list[Any], given: list[Any]) -> list[Any]:
    """The pictures of `messages` in order, with `given` put in their places. May add image parts to the last user
    message."""
    bare = sum(source is BARE_IMAGE for source in sources)
    if bare:
        if bare != len(given):
            raise PromptError(f"images: expected {bare}, one for each image part without data, found {len(given)}")
        following = iter(given)
        return [next(following) if source is BARE_IMAGE else source for source in sources]
    if not given:
        return sources
    place = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
    if place is None:
        raise PromptError("images: expected a user message to put them into, found none")
    before = sum(_count_parts(message) for message in messages[:place])
    content = messages[place].get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    messages[place]["content"] = [{"type": "image", "image": ""} for _ in given] + parts
    return sources[:before] + given + sources[before:]


def _count_parts(message: dict[str, Any]) -> int:
    content = message.get("content")
    return sum(part["type"] == "image" for part in content) if isinstance(content, list) else 0


def _encoded(text: str, tokenizer: Tokenizer | None, config: ModelConfig) -> NDArray[np.int64]:
    if tokenizer is None:
        raise ConfigError(
            "tokenizer.json: expected one beside the model, found none; give token ids, or fetch the file"
        )
    ids = np.array(tokenizer.encode(text), np.int64)
    if len(ids) and ids.max() >= config.text.vocab_size:
        raise ConfigError(
            f"tokenizer.json: expected ids below the model's vocab_size {config.text.vocab_size}, found {ids.max()}; "
            "tokenizer and model do not belong together"
        )
    return ids


def _checked_ids(ids: Any, vocab_size: int) -> NDArray[np.int64]:
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise PromptError(
            f"token ids: expected a flat list of whole numbers, found something else ({error})"
        ) from error
    if array.ndim != 1:
        raise PromptError(
            f"token ids: expected one dimension [T], found shape {list(array.shape)}; give one sequence at a time"
        )
    if not array.size:
        return np.empty(0, np.int64)
    is_list = not isinstance(ids, np.ndarray)
    if array.dtype.kind not in "iu" or (is_list and any(isinstance(i, (bool, np.bool_)) for i in ids)):
        odd = next((i for i in ids if isinstance(i, (bool, np.bool_)) or not isinstance(i, (int, np.integer))), ids[0])
        raise PromptError(
            f"token ids: expected whole numbers from 0 to {vocab_size - 1}, found {odd!r:.80} (dtype {array.dtype})"
        )
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        place = int(wrong.argmax())
        raise PromptError(
            f"token ids: expected whole numbers from 0 to {vocab_size - 1}, found {array[place]} at index {place}"
        )
    return array.astype(np.int64)


def _count_placeholders(ids: NDArray[np.int64], images: int, config: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """How many image placeholders `ids` hold. Refuses what cannot be right before any picture is loaded."""
    if config.vision is None:
        if images:
            raise PromptError(f"images: expected none, found {images}; this checkpoint has no vision tower")
        return 0
    if (ids == config.video_token_id).any():
        raise PromptError("prompt: found a video placeholder; videos are not supported, give single pictures instead")
    written = tokenizer.id_of(IMAGE_PLACEHOLDER) if tokenizer else None
    if images and written is not None and written != config.image_token_id:
        raise ConfigError(
            f"config.json: image_token_id: expected {written}, the tokenizer's {IMAGE_PLACEHOLDER}, "
            f"found {config.image_token_id}; tokenizer and model do not belong together"
        )
    placeholders = int((ids == config.image_token_id).sum())
    if (placeholders == 0) != (images == 0) or placeholders < images:
        raise _mismatch(placeholders, images)
    return placeholders


def _mismatch(placeholders: int, images: int) -> PromptError:
    advice = (
        f"write <|vision_start|>{IMAGE_PLACEHOLDER}<|vision_end|> where each belongs, or use messages"
        if placeholders < images
        else "give a picture for each, and keep the placeholder out of other text"
    )
    return PromptError(
        f"prompt: expected as many image placeholders as pictures, found {placeholders} and {images}; {advice}"
    )


def _load_images(
    sources: list[Any],
    config: ModelConfig,
    processor: ImageProcessor | None,
    min_pixels: int | None,
    max_pixels: int | None,
) -> list[ImageInput]:
    if not sources:
        return []
    if processor is None or config.vision is None:
        raise PromptError(
            "images: expected none; this model was loaded without image preprocessing (preprocessor_config.json)"
        )
    vision = config.vision
    for found, expected, key in (
        (processor.patch_size, vision.patch_size, "patch_size"),
        (processor.merge_size, vision.spatial_merge_size, "merge_size"),
        (processor.temporal_patch_size, vision.temporal_patch_size, "temporal_patch_size"),
    ):
        if found != expected:
            raise ConfigError(
                f"preprocessor_config.json: {key}: expected {expected} as in config.json's vision_config, found {found}"
            )
    return [processor.process(source, min_pixels=min_pixels, max_pixels=max_pixels) for source in sources]


def _expand(ids: NDArray[np.int64], counts: list[int], image_token_id: int | None) -> NDArray[np.int64]:
    """Repeat the i-th placeholder counts[i] times."""
    if not counts:
        return ids
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == image_token_id] = counts
    return np.repeat(ids, repeats)
