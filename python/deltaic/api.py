"""The public face: a `Model` answers questions about text and pictures. `deltaic.loading` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import choice, describe
from .chat.files import ChatFiles
from .errors import ArgumentError, ContextLengthError, PromptError, StateError
from .generate.answer import Job, TextRules
from .generate.cache import PrefixCache
from .generate.loop import generate_ids
from .generate.options import (
    MAX_NEW_TOKENS,
    check_logprobs,
    check_options,
    is_small,
    read_generation_config,
    recommended_sampling,
    resolve_sampling,
)
from .generate.prefix import split_points
from .generate.reading import Reading
from .generate.request import BatchStream
from .generate.runner import Runner
from .generate.sampling import Sampler
from .generate.scheduler import MAX_SEQUENCES, Scheduler
from .generate.speculate import MODES, Speculator
from .generate.stop import ReasoningSplit, StopStrings, check_stop
from .generate.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .chat.image import ImageProcessor
    from .chat.prompt import Prompt
    from .chat.template import ChatTemplate
    from .chat.tokenizer import Tokenizer
    from .generate.cache import Checkpoint
    from .generate.options import GenerationOptions
    from .generate.result import GenerationResult, TokenLogprobs
    from .generate.spill import SpillFolder
    from .model.config import ModelConfig
    from .model.mtp import MtpModel
    from .model.state import State
    from .model.text import TextModel
    from .model.vision import VisionModel
    from .session import Session
    from .weights.precision import Precision

NO_MTP = "no multi-token-prediction layer (mtp.* tensors); use speculate='lookup' or 'auto', or a checkpoint with them"
FEATURE_SHARE = 8  # what the vision tower saw may take an eighth of the prefix cache's bytes


class Model:
    """A loaded checkpoint; made by `deltaic.load`. May be used from several threads: computation takes turns, token by
    token.

    Every method that takes generation options knows those of `deltaic.generate.options.GenerationOptions`:
    max_new_tokens, temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty, seed,
    stop, logprobs, speculate.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        text: TextModel,
        vision: VisionModel | None,
        ops: ModuleType,
        blank: State,
        *,
        device: str,
        precision: Precision,
        threads: int,
        cache_bytes: int,
        spill: SpillFolder | None,
        mtp: MtpModel | None,
        speculate: str,
    ) -> None:
        """blank: a state that is never fed, which says what states of this model look like."""
        self.folder = folder
        self.config = config
        self.device = device
        self.precision = precision
        self.kv_dtype = blank.kv_dtype
        self.threads = threads
        self.speculate = speculate
        features = 0 if vision is None else cache_bytes // FEATURE_SHARE
        self.cache = PrefixCache(cache_bytes - features, spill=spill)
        self._blank_state = blank
        self._ops = ops
        self._runner = Runner(
            text, vision, ops, threads=threads, image_token_id=config.image_token_id, feature_bytes=features, mtp=mtp,
        )  # fmt: skip
        self._generation_config = read_generation_config(folder)
        self._files = ChatFiles(folder)

    @property
    def dtype(self) -> str:
        """How the weight matrices are stored, in words."""
        return str(self.precision)

    def __repr__(self) -> str:
        return f"<deltaic.Model {self.folder.name} {self.dtype} on {self.device}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokeniser, read on first use."""
        return self._files.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template, read on first use."""
        return self._files.template

    @property
    def image_processor(self) -> ImageProcessor | None:
        """The checkpoint's image preprocessing, read on first use; None where the checkpoint has none."""
        see = self.config.vision is not None and self._files.has_image_processor
        return self._files.image_processor if see else None

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer together may have."""
        return self._blank_state.context

    # ------------------------------------------------------------------------------- prompt and logits

    def prepare(
        self,
        prompt: Any,
        *,
        thinking: bool | None = None,
        images: Any = None,
        tools: Sequence[dict[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """Turn messages, raw text or token ids into a Prompt: expanded token ids, pictures, positions.

        Messages are rendered with the checkpoint's template, to which template_variables go; a string is raw text in
        which special tokens are honoured. min_pixels and max_pixels replace the checkpoint's limits of a picture's
        area. Raises PromptError, ImageError, ArgumentError or ContextLengthError.
        """
        from .chat.prompt import Prompt, prepare

        settings: dict[str, Any] = {
            "thinking": thinking,
            "images": images,
            "tools": tools,
            "template_variables": template_variables,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
        }
        if isinstance(prompt, Prompt):
            given = [name for name, value in settings.items() if value is not None]
            if given:
                raise ArgumentError(f"{given[0]}: belongs to Model.prepare; this Prompt is prepared already")
            made = prompt
        else:
            made = prepare(
                prompt,
                config=self.config,
                tokenizer=self.tokenizer if self._files.has_tokenizer else None,
                template=self.template,
                image_processor=self.image_processor,
                **settings,
            )
        made.check(self.config.text.vocab_size)
        if len(made) > self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(made)} tokens, the context has room for {self.context_length}; shorten the prompt"
            )
        return made

    def new_state(self) -> State:
        """An empty sequence state, to feed with `forward`."""
        return self._blank_state.empty()

    def _own_state(self, state: Any) -> State:
        """`state`, bound to this model. Raises StateError where it belongs to another."""
        from .model.state import State

        if not isinstance(state, State):
            raise StateError(f"state: expected a State from Model.new_state(), found {describe(state)}")
        if not self._blank_state.fits(state):
            raise StateError("state: it belongs to a model of another shape; expected one from this Model.new_state()")
        if state.fingerprint not in ("", self._blank_state.fingerprint):
            raise StateError(
                f"state: it belongs to another model ({state.fingerprint[:12]}; this is "
                f"{self._blank_state.fingerprint[:12]}): other weights, or stored with another dtype"
            )
        return state.on(self._ops)

    @cached_property
    def _border_id(self) -> int | None:
        """The token after which a message ends; None without a tokeniser, or one that does not know messages."""
        return self.tokenizer.id_of("<|im_end|>") if self._files.has_tokenizer else None

    def forward(self, prompt: Any, state: State | None = None) -> np.ndarray:
        """Logits after every token of `prompt` (anything `prepare` takes): float32 [T, vocab].

        With `state` the prompt continues that sequence, and the state is advanced. Raises what `prepare` raises, and
        StateError for a state of another model.
        """
        made = self.prepare(prompt)
        state = self.new_state() if state is None else self._own_state(state)
        total = state.length + len(made.token_ids)
        if total > self.context_length:
            raise ContextLengthError(
                f"the state holds {state.length} tokens and the prompt {len(made.token_ids)}, together {total}; "
                f"the context has room for {self.context_length}"
            )
        shape = (len(made.token_ids), self.config.text.vocab_size)
        try:
            logits = np.empty(shape, np.float32)
        except MemoryError:
            raise ArgumentError(
                f"the logits of {shape[0]} tokens need {4e-9 * shape[0] * shape[1]:.1f} GB, which cannot be had; "
                "feed the prompt in parts, with a state"
            ) from None
        to_numpy = getattr(self._ops, "to_numpy", np.asarray)
        row, before = 0, len(state.token_ids)
        pauses = [len(made.token_ids)]
        if len(made.token_ids) > 1:
            whole = np.concatenate([np.array(state.token_ids, np.int64), made.token_ids])
            pauses = [p - before for p, _ in split_points(whole, self._border_id) if p > before]
        for hidden in self._runner.hidden(made, state, pauses, prefill=len(made) > 1):
            logits[row : row + len(hidden)] = to_numpy(self._runner.logits(hidden))
            row += len(hidden)
        return logits

    # ------------------------------------------------------------------------------- generation

    def stream(
        self,
        prompt: Any,
        *,
        images: Any = None,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Answer piece by piece: an iterator of StreamPiece with a `result`; close it to stop early.

        prompt    messages, a string (one user message), token ids, or a Prompt
        images    put before the text of the last user message: paths, bytes, PIL images, arrays, data: or http(s) URLs
        thinking  True or False; None: the template's own default
        """
        return self._start(_as_messages(prompt, images), images, thinking, tools, options)

    def chat(
        self,
        prompt: Any,
        *,
        images: Any = None,
        thinking: bool | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """As `stream`, but returns the finished answer."""
        return self._start(_as_messages(prompt, images), images, thinking, tools, options).finish()

    def generate(self, prompt: Any, *, images: Any = None, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Continue raw text (special tokens in it are honoured), token ids or a Prompt."""
        return self._start(prompt, images, None, None, options).finish()

    def generate_batch(
        self,
        prompts: Sequence[Any],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        max_sequences: int = MAX_SEQUENCES,
        **options: Any,
    ) -> list[GenerationResult]:
        """Answer several prompts, computing up to max_sequences of them in common steps; the results, in order. Each
        answer is the one that its prompt gets alone.

        prompts  each raw text, messages, token ids or a Prompt, as in `prepare`
        each     for every prompt the options of its own, which come before the common ones
        options  thinking, tools, images, and those of `generate`, for all prompts

        Raises what `generate` raises, naming the prompt, before anything is computed; an error while one prompt is
        computed, after all others are finished. `stream_batch` also gives the results of those that did not fail.
        """
        return self.stream_batch(prompts, each=each, max_sequences=max_sequences, **options).finish()

    def stream_batch(
        self,
        prompts: Sequence[Any],
        *,
        each: Sequence[Mapping[str, Any]] | None = None,
        max_sequences: int = MAX_SEQUENCES,
        **options: Any,
    ) -> BatchStream:
        """As `generate_batch`, piece by piece: an iterator of (index of the prompt, StreamPiece) with `results`."""
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
            raise PromptError(f"prompts: expected a list of prompts, found {describe(prompts)}")
        own = [{}] * len(prompts) if each is None else each
        if isinstance(own, (str, bytes, Mapping)) or not isinstance(own, Sequence) or len(own) != len(prompts):
            raise ArgumentError(f"each: expected a list of {len(prompts)} dicts, one per prompt, found {describe(own)}")
        for i, mapping in enumerate(own):
            if not isinstance(mapping, Mapping):
                raise ArgumentError(f"each[{i}]: expected a dict of options, found {describe(mapping)}")
        return BatchStream(self.scheduler(max_sequences=max_sequences), prompts, own, options)

    def scheduler(self, **limits: Any) -> Scheduler:
        """A scheduler of this model's generations, for a server or any program that has several at a time. limits:
        max_sequences, max_bytes, prefill_tokens, see `deltaic.generate.scheduler.Scheduler`."""
        return Scheduler(self._runner, self.new_state, self._job, **limits)

    def _start(
        self,
        prompt: Any,
        images: Sequence[Any] | None,
        thinking: bool | None,
        tools: Sequence[dict[str, Any]] | None,
        options: GenerationOptions,
        *,
        also: Sequence[Checkpoint] | None = None,
        on_end: Callable[[GenerationResult | None], None] | None = None,
    ) -> Stream:
        """Check every argument now, compute when the stream is first asked for a piece.

        also: checkpoints of a session, to use beside those of the cache; new ones are then made even if it is off.
        on_end: see Stream.
        """
        job = self._job(prompt, images, thinking, tools, options, also=also)

        def tokens() -> Iterator[tuple[int, TokenLogprobs | None]]:
            return generate_ids(
                self._runner,
                job.prompt,
                job.reading,
                job.sampler,
                blank=self.new_state,
                end_ids=job.end_ids,
                max_new_tokens=job.max_new_tokens,
                speculator=job.speculator,
            )

        return Stream(tokens, job, on_end=on_end)

    def _job(
        self,
        prompt: Any,
        images: Sequence[Any] | None,
        thinking: bool | None,
        tools: Sequence[dict[str, Any]] | None,
        options: GenerationOptions,
        *,
        also: Sequence[Checkpoint] | None = None,
    ) -> Job:
        """What is to be generated, with every argument checked."""
        began = perf_counter()
        check_options(options)
        mode = self._speculation(options.get("speculate"))
        made = self.prepare(prompt, thinking=thinking, images=images, tools=tools)
        in_thinking = self.template.starts_in_thinking(made.text)
        recommended = recommended_sampling(
            small=is_small(self.config.text), thinking=in_thinking, image=bool(made.images)
        )
        params = resolve_sampling(options, self._generation_config, recommended)
        max_new_tokens = self._room(len(made.token_ids), options.get("max_new_tokens"))
        limit, unused = self._sampled_ids
        logprobs = check_logprobs(options.get("logprobs"))
        sampler = Sampler(self._ops, params, limit=limit, unused=unused, prompt_ids=made.token_ids, logprobs=logprobs)
        stop = StopStrings(check_stop(options.get("stop")))
        return Job(
            prompt=made,
            reading=self._reading(made, also),
            sampler=sampler,
            rules=TextRules(self.tokenizer.stream(), ReasoningSplit(in_thinking), stop),
            end_ids=self.end_ids,
            max_new_tokens=max_new_tokens,
            speculator=None if mode == "off" else Speculator(self._runner, sampler, made.token_ids.tolist(), mode),
            prepare_seconds=perf_counter() - began,
        )

    def _speculation(self, mode: str | None) -> str:
        """The mode of one call. Raises ArgumentError where the model was loaded without what it needs."""
        if mode is None:
            return self.speculate
        choice("speculate", mode, MODES)
        if mode == "mtp" and self._runner.mtp is None:
            found = f"the model was loaded with speculate={self.speculate!r}"
            raise ArgumentError(f"speculate: 'mtp' needs the MTP layer, but {found}, or its checkpoint holds {NO_MTP}")
        return mode

    def _reading(self, prompt: Prompt, also: Sequence[Checkpoint] | None) -> Reading:
        """How `prompt` goes through the cache."""
        from .chat.prompt import mrope_positions

        grids = [image.token_grid for image in prompt.images]
        image_token_id = self.config.image_token_id
        try:
            implied = mrope_positions(prompt.token_ids, grids, image_token_id)
        except PromptError:  # made by hand, and wrong: reading it will say so
            implied = None
        return Reading(
            self.cache,
            prompt,
            border_id=self._border_id,
            image_token_id=image_token_id,
            split_invariant=self._ops.SPLIT_INVARIANT,
            canonical=implied is not None and np.array_equal(implied, prompt.position_ids),
            also=also or (),
            keep=also is not None,
        )

    # ------------------------------------------------------------------------------- conversations

    def session(self, messages: Sequence[Mapping[str, Any]] | None = None, **settings: Any) -> Session:
        """A conversation that remembers: see `deltaic.session.Session`. messages: what was said before, for example a
        system message; settings: thinking, tools, and generation options for every turn."""
        from .session import Session

        return Session(self, messages, **settings)

    def load_session(self, path: str | Path) -> Session:
        """The conversation in a file of `Session.save`. Raises StateError."""
        from .session import Session

        return Session.load(self, path)

    @cached_property
    def _sampled_ids(self) -> tuple[int, list[int]]:
        """(limit, unused): ids below `limit` that are not in `unused` have a token in the tokeniser and in the head.
        Placeholders of pictures and videos are unused too: a generated one would stand for a medium that is not there.
        """
        tokenizer, vocabulary = self.tokenizer, self.config.text.vocab_size
        placeholders = self.config.image_token_id, self.config.video_token_id
        unused = {*tokenizer.unused_ids, *(i for i in placeholders if i is not None)}
        return min(tokenizer.vocab_size, vocabulary), sorted(i for i in unused if i < vocabulary)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those the files of the checkpoint name, and the template's own. The files disagree
        between releases, so the union counts."""
        tokenizer = self.tokenizer
        own = (tokenizer.eos_token_id, tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>"))
        return frozenset(self.config.eos_token_ids) | {i for i in own if i is not None}

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        """How many tokens may be generated. Raises ContextLengthError with both numbers where they do not fit."""
        room = self.context_length - prompt_tokens
        if asked is not None and asked > room:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and max_new_tokens is {asked}, "
                f"together {prompt_tokens + asked}; the context has room for {self.context_length}"
            )
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens, the context has room for {self.context_length} "
                "with the answer; shorten the prompt"
            )
        return asked or min(room, self._generation_config.get("max_new_tokens", MAX_NEW_TOKENS))

    # ------------------------------------------------------------------------------- facts

    def info(self) -> dict[str, Any]:
        """Facts about the loaded model, as plain values."""
        from .model.weights import weight_bytes

        text, vision = self.config.text, self._runner.vision
        return {
            "folder": str(self.folder),
            "architecture": self.config.architecture,
            "device": self.device,
            "isa": self._ops.isa(),
            "threads": self.threads,
            "dtype": self.dtype,
            "vision_dtype": self.precision.vision if vision is not None else None,
            "activations": self.precision.activations,
            "kv_dtype": self.kv_dtype,
            "context_length": self.context_length,
            "layers": text.num_hidden_layers,
            "delta_layers": text.num_delta_layers,
            "attention_layers": text.num_attention_layers,
            "vision": vision is not None,
            "mtp": self._runner.mtp is not None,
            "speculate": self.speculate,
            "weight_bytes": sum(
                weight_bytes(part.weights) for part in (self._runner.text, vision, self._runner.mtp) if part is not None
            ),
            "screen_bytes": 0 if self._runner.text.screen is None else self._runner.text.screen.nbytes,
            "state_bytes": self._blank_state.nbytes,
            "cache_bytes": self.cache.budget + self._runner.features.budget,
            "fingerprint": self._blank_state.fingerprint,
        }


def _as_messages(prompt: Any, images: Any) -> Any:
    """For chat and stream a string is one user message; it may be empty only beside pictures."""
    if not isinstance(prompt, str):
        return prompt
    if not prompt.strip() and (images is None or (isinstance(images, (list, tuple)) and not images)):
        raise PromptError("the prompt is empty; expected a question")
    return [{"role": "user", "content": prompt}]
