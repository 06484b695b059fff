"""A conversation that remembers what it has read, can go back, branch, and continue tomorrow."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import describe, integer
from .errors import ArgumentError, ContextLengthError, PromptError, StateError
from .generate.options import check_option_names

if TYPE_CHECKING:
    from .api import Model
    from .chat.image import ImageInput
    from .generate.cache import Checkpoint
    from .generate.reading import Reading
    from .generate.result import GenerationResult
    from .generate.stream import Stream

_SETTINGS = ("thinking", "tools")
_GOES_ON = {"role": "user", "content": "."}  # stands for whatever is said next


class Session:
    """A conversation with a model, made by `Model.session`.

    messages   what was said, as dicts; assistant messages keep their thinking in "reasoning_content", which the chat
               template shows to the model or drops. Pictures are held resized, as `ImageInput`. Do not change it.
    settings   thinking, tools and generation options for every turn; a turn's own options come first

    The session holds the checkpoints of its last turn itself, so that it goes on without reading again even where the
    model's cache is off or has dropped them. Not for use from two threads at a time; forks are independent.
    """

    def __init__(self, model: Model, messages: Sequence[Mapping[str, Any]] | None = None, **settings: Any) -> None:
        check_option_names({name: value for name, value in settings.items() if name not in _SETTINGS})
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, (Sequence, type(None))):
            raise PromptError(f"messages: expected a list of dicts, found {describe(messages)}")
        self.model = model
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        for i, message in enumerate(messages or ()):
            if not isinstance(message, Mapping):
                raise PromptError(f"messages[{i}]: expected a dict, found {describe(message)}")
            self.messages.append(self._loaded(message))
        self.checkpoints: list[Checkpoint] = []
        self._open: weakref.ref[Stream] | None = None

    # ------------------------------------------------------------------------------- talking

    def say(self, text: str, *, images: Any = None, **options: Any) -> GenerationResult:
        """Say `text`, with pictures before it, and return the answer. Both become part of the conversation; after an
        error it stands where it stood. options: those of `Model.chat`, for this turn."""
        return self.stream(text, images=images, **options).finish()

    def stream(self, text: str, *, images: Any = None, **options: Any) -> Stream:
        """As `say`, piece by piece. The turn becomes part of the conversation when the stream ends; closed early, with
        the answer up to there. A stream of this session that is still open is closed first. Raises StateError if that
        one is being read at this moment, in another thread."""
        still = None if self._open is None else self._open()
        if still is not None:
            still.close()
            if not still.ended:
                raise StateError("session: an answer is being streamed; finish or close that stream first")
        if not isinstance(text, str):
            raise PromptError(f"text: expected a str, found {describe(text)}")
        pictures = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        if not text.strip() and not pictures:
            raise PromptError("the message is empty; expected text or a picture")
        parts = [{"type": "image", "image": picture} for picture in pictures]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        said = self._loaded({"role": "user", "content": content})
        settings = {**self.settings, **options}
        reading: list[Reading] = []

        def on_end(result: GenerationResult | None) -> None:
            if result is not None and (result.token_ids or result.finish_reason != "cancelled"):
                answer: dict[str, Any] = {"role": "assistant", "content": result.text}
                if result.reasoning:
                    answer["reasoning_content"] = result.reasoning
                self.messages += [said, answer]
                self.checkpoints = reading[0].kept

        stream = self.model._start(
            [*self.messages, said],
            None,
            settings.pop("thinking", None),
            settings.pop("tools", None),
            settings,  # type: ignore[arg-type]
            also=self.checkpoints,
            on_end=on_end,
        )
        reading.append(stream.reading)
        self._open = weakref.ref(stream)
        return stream

    def undo(self, turns: int = 1) -> None:
        """Take back the last `turns` questions and their answers. Raises ArgumentError where there are fewer."""
        integer("turns", turns, 1, 2**31)
        asked = [i for i, message in enumerate(self.messages) if message.get("role") == "user"]
        if turns > len(asked):
            raise ArgumentError(f"turns: expected at most {len(asked)}, the questions asked so far, found {turns}")
        del self.messages[asked[-turns] :]

    def fork(self) -> Session:
        """A second conversation that goes on from here, and shares what was read."""
        twin = Session(self.model, **self.settings)
        twin.messages, twin.checkpoints = list(self.messages), list(self.checkpoints)
        return twin

    def _loaded(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the message whose pictures are loaded: what is said stays said, whatever happens to a file."""
        from .chat.template import clean_messages

        loaded = dict(message)
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            images = iter(clean_messages([message])[1])
            processor = self.model.image_processor
            parts: list[Any] = []
            for part in clean_messages([message])[0][0]["content"]:
                if part["type"] == "image":
                    if processor is None:
                        raise PromptError("images: expected none, this model was loaded without image preprocessing")
                    part = {"type": "image", "image": processor.process(next(images))}
                parts.append(part)
            loaded["content"] = parts
        return loaded

    # ------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation, its pictures, and the state to go on from, to one file. Raises StateError or
        ArgumentError (for messages or settings that JSON cannot hold)."""
        from .model.state_file import save_state

        checkpoint = self._resume_point()
        pictures: list[ImageInput] = []
        try:
            facts = json.dumps({"messages": _without_pictures(self.messages, pictures), "settings": self.settings})
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"session: messages and settings must be plain values to be saved ({error})") from None
        arrays: dict[str, Any] = {f"picture.{i}": image.pixels for i, image in enumerate(pictures)}
        metadata = {"session": facts}
        state = self.model.new_state()
        if checkpoint is not None:
            state = checkpoint.state
            arrays["hidden"] = checkpoint.host_hidden()
            metadata["generated"] = str(int(checkpoint.generated))
        save_state(state, path, metadata=metadata, arrays=arrays)

    def _resume_point(self) -> Checkpoint | None:
        """The checkpoint that the next turn will start from: which it is depends on what the template keeps."""
        if not self.messages:
            return None
        settings = {name: self.settings[name] for name in _SETTINGS if name in self.settings}
        try:
            prompt = self.model.prepare([*self.messages, _GOES_ON], **settings)
        except ContextLengthError:  # nothing more can be said, so nothing needs to be resumed
            return None
        return self.model._reading(prompt, self.checkpoints).look()

    @classmethod
    def load(cls, model: Model, path: str | os.PathLike[str]) -> Session:
        """The conversation in a file of `save`, to go on with the same model. Raises StateError."""
        from .generate.cache import Checkpoint
        from .generate.prefix import PrefixDigest, sequence_keys
        from .model.state_file import load_state

        state, metadata, arrays = load_state(path, model._ops)
        if "session" not in metadata:
            raise StateError(f"{path} holds a state without a conversation; read it with deltaic.State.load")
        model._own_state(state)
        try:
            facts = json.loads(metadata["session"])
            session = cls(model, _with_pictures(facts["messages"], arrays, model), **facts["settings"])
            if "hidden" in arrays:
                keys = sequence_keys(np.array(state.token_ids, np.int64), state.images)
                digest = PrefixDigest(keys)(len(keys))
                hidden, generated = arrays["hidden"], metadata["generated"] == "1"
                if hidden.shape != (1, model.config.text.hidden_size) or len(keys) != state.length:
                    raise ValueError("the state is incomplete")
                state._max_tokens = model.context_length
                session.checkpoints = [Checkpoint(keys, digest, state, hidden, generated)]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StateError(f"{path}: not a usable session: {error!r}"[:300]) from error
        return session


def _without_pictures(messages: list[dict[str, Any]], pictures: list[ImageInput]) -> list[dict[str, Any]]:
    """Copies of the messages in which each picture is its index in `pictures`, to which they are added."""

    def plain(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        pictures.append(part["image"])
        return {"type": "image", "image": len(pictures) - 1}

    return [
        {**message, "content": [plain(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _with_pictures(messages: list[dict[str, Any]], arrays: dict[str, Any], model: Model) -> list[dict[str, Any]]:
    from .chat.image import ImageInput

    processor = model.image_processor

    def full(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        if processor is None:
            raise ValueError("it holds pictures, and the model was loaded without image preprocessing")
        p = processor
        pixels = arrays[f"picture.{part['image']}"]
        side = p.patch_size * p.merge_size
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,) or not pixels.size or any(
            n % side for n in pixels.shape[:2]
        ):  # fmt: skip
            raise ValueError(f"picture {part['image']} is {pixels.dtype}{pixels.shape}")
        image = ImageInput(pixels, p.patch_size, p.merge_size, p.temporal_patch_size, p.mean, p.std)
        return {"type": "image", "image": image}

    return [
        {**message, "content": [full(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
