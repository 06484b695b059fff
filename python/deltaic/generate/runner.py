"""One model on one op set, and what it computes for sequences: chunks of prompts, tokens, drafts and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PromptError
from ..ops.devices import ops_lock
from ..ops.layout import row_bounds, row_counts
from .cache import FeatureCache
from .costs import Costs
from .prefill import PromptReader
from .prefix import image_places
from .sampling import drafting_together

if TYPE_CHECKING:
    from ..chat.image import ImageInput
    from ..chat.prompt import Prompt
    from ..model.choice import Choice, Choosing
    from ..model.mtp import MtpModel
    from ..model.state import State
    from ..model.text import Mark, TextModel
    from ..model.vision import VisionModel
    from .costs import Acceptance
    from .speculate import Drafting


MAX_TRACES = 4  # that are kept


@dataclass(slots=True)
class Verification:
    """Drafted rows of B sequences that the model has seen and their states have not, until `Runner.commit`.

    tokens  per sequence the token that comes next and the drafts after it
    hidden  [T, H] (before the final norm): of sequence b rows cu_seqlens[b] .. cu_seqlens[b + 1], one per token
    logits  [T, vocab], where they were asked for
    chosen  the token after each row, where they were to be chosen
    """

    states: list[State]
    tokens: list[list[int]]
    cu_seqlens: np.ndarray
    hidden: np.ndarray
    logits: np.ndarray | None
    chosen: list[int] | None
    trace: np.ndarray
    counts: np.ndarray | None = None  # int64 [B], how many of each sequence's tokens its state has got


def _owed(verification: Verification | None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What `TextModel.write` has to do for one that has been counted."""
    if verification is None:
        return None
    assert verification.counts is not None
    return verification.cu_seqlens, verification.counts, verification.trace


class Runner:
    """Feeds sequences to one model on one op set, from any thread.

    The op set's lock is held for one chunk or one token at a time and never while a caller has the turn: several
    streams may be open at once and interleave, in one thread or in many, and one that is abandoned blocks nobody.
    """

    def __init__(
        self,
        text: TextModel,
        vision: VisionModel | None,
        ops: Any,
        *,
        threads: int,
        image_token_id: int | None,
        feature_bytes: int = 0,
        mtp: MtpModel | None = None,
    ) -> None:
        """feature_bytes: how much memory the features of pictures seen before may take. mtp: makes drafts."""
        self.text = text
        self.mtp = mtp
        self.vision = vision
        self.ops = ops
        self.features = FeatureCache(feature_bytes)
        self._threads = threads
        self._image_token_id = image_token_id
        self._resident = getattr(ops, "device_resident", False)
        self._concatenate = getattr(ops, "concatenate", np.concatenate)
        self._zeros = getattr(ops, "zeros", np.zeros)
        self._traces: dict[int, np.ndarray] = {}  # that no verification uses, by their rows
        self.costs = Costs()
        self.acceptances: list[Acceptance] = []  # of the sources of drafts, in the sequence that ended last
        self.rests = 0  # how long it rested, see Speculator
        self.fixed_depth: int | None = None  # see Speculator.depth
        self._lock = ops_lock(ops)

    def _set_threads(self) -> None:
        """Called with the lock held: another model may have used the op set with another number."""
        if self.ops.num_threads() != self._threads:
            self.ops.set_num_threads(self._threads)

    def places(self, prompt: Prompt, offset: int = 0) -> list[tuple[int, int, str]]:
        """(index of the first placeholder + offset, tokens, digest) of each picture. Raises PromptError if the model
        cannot see, or if placeholders and pictures do not match."""
        if not prompt.images:
            return []
        if self.vision is None:
            raise PromptError(
                "the prompt holds a picture, but this checkpoint has no vision tower; ask without pictures"
            )
        placeholders = int(np.count_nonzero(prompt.token_ids == self._image_token_id))
        needed = sum(image.num_tokens for image in prompt.images)
        if placeholders != needed:
            raise PromptError(
                f"the prompt has {placeholders} image placeholder tokens, its {len(prompt.images)} pictures need "
                f"{needed}; build prompts with Model.prepare"
            )
        return image_places(prompt, self._image_token_id, offset)

    def see(self, image: ImageInput) -> np.ndarray:
        """What the vision tower sees in a picture: float32 [tokens, H]. Each picture is encoded by itself, so that its
        features do not depend on which others are in the prompt or in the cache."""
        assert self.vision is not None  # places() has refused pictures
        features = self.features.get(image.digest)
        if features is None:
            with self._lock:
                self._set_threads()
                features = self.vision.forward([image])
            self.features.put(image.digest, features)
        return features

    def hidden(
        self,
        prompt: Prompt,
        state: State,
        pauses: Sequence[int],
        *,
        skip: int = 0,
        prefill: bool = True,
        mtp: bool = False,
        before: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:
        """Feed the prompt to `state` and yield the hidden rows [t, H] (before the final norm) up to each of `pauses`:
        rising numbers of tokens of the prompt, the last one its length.

        skip: the state holds so many of the prompt's tokens already; else it may hold others, and positions go on where
        it stands. prefill: see TextModel.forward. Pictures are encoded when they are reached.
        mtp: make the entries of the MTP layer too; before: the hidden row [1, H] of the token before, where known.
        """
        reader = PromptReader(self, prompt, state, skip, mtp=mtp, last=before)
        for end in pauses:
            reader.look(end)
            yield self.read([(reader, end)], prefill=prefill)[0]

    def read(
        self, chunks: Sequence[tuple[PromptReader, int]], *, prefill: bool = True, marks: Sequence[Mark] = ()
    ) -> list[np.ndarray]:
        """Read on in several prompts at once, each up to its number of tokens; the pictures up to there have been
        looked at. Hidden rows [t, H] (before the final norm) of each. prefill, marks: see TextModel.forward."""
        parts = [reader.chunk(end) for reader, end in chunks]
        cuts = np.cumsum([0, *(len(part.ids) for part in parts)], dtype=np.int64)
        with self._lock:
            self._set_threads()
            x = self.text.embed(np.concatenate([part.ids for part in parts]))
            for part, first in zip(parts, cuts.tolist(), strict=False):
                for row, features in part.features:
                    x[first + row : first + row + len(features)] = features
            positions = np.concatenate([part.positions for part in parts])
            states = [reader.state for reader, _ in chunks]
            hidden = self.text.forward(x, positions, states, cuts, prefill=prefill, marks=marks)
            rows = []
            for (reader, end), a, b in zip(chunks, cuts.tolist(), cuts[1:].tolist(), strict=False):
                rows.append(hidden[a:b])
                if reader.mtp:
                    self._read_mtp(reader, end, x[a:b], rows[-1])
                reader.advance(end, rows[-1])
        return rows

    def step(self, token: int, state: State) -> np.ndarray:
        """Feed one token; hidden row [1, H] (before the final norm)."""
        return self.decode([token], [state])[0]

    def decode(
        self,
        tokens: Sequence[int],
        states: Sequence[State],
        *,
        head: bool = False,
        choosing: Choosing | None = None,
    ) -> tuple[np.ndarray, np.ndarray | None, list[int] | None]:
        """Feed one token to each of B states. Hidden rows [B, H] (before the final norm); with `head` their logits
        [B, vocab]; with `choosing`, where the op set can, the token after each of them instead of these."""
        with self._lock:
            self._set_threads()
            found = self.text.step([[token] for token in tokens], states, head=head, choosing=choosing)
            for token, state in zip(tokens, states, strict=True):
                state.token_ids.append(token)
        return found

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits [n, vocab] of hidden rows [n, H]."""
        with self._lock:
            self._set_threads()
            return self.text.logits(hidden)

    def choose(self, logits: np.ndarray, choosing: Choosing, fed: Sequence[Sequence[int]]) -> list[int]:
        """The token after each row of logits: see `Choosing.choose`."""
        with self._lock:
            self._set_threads()
            return choosing.choose(self.ops, logits, fed)

    @property
    def recordings(self) -> int:
        """How many tapes have been made: the time of a step that made one tells nothing of the next."""
        return self.text.replay.recordings

    def wait(self) -> None:
        """Let a device finish what it was given, before time is taken."""
        if self._resident:
            self.ops.wait()

    def rows(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden rows [n, H] of a file, float32, as this op set has them."""
        if not self._resident or not isinstance(hidden, np.ndarray):
            return hidden
        return self.ops.activations(hidden, self.text.weights.embed)

    # ------------------------------------------------------------------------------- drafts

    def verify(
        self,
        states: Sequence[State],
        tokens: Sequence[Sequence[int]],
        *,
        head: bool = False,
        choosing: Choosing | None = None,
    ) -> Verification:
        """Run the next token of each sequence, and the drafts that may follow it, against its state without changing
        it. tokens: per sequence 1 to 64 ids. head, choosing: see `decode`. `commit` the result, or drop it."""
        cu_seqlens = row_bounds(*map(len, tokens))
        with self._lock:
            self._set_threads()
            trace = self._take_trace(sum(map(len, tokens)))
            hidden, logits, chosen = self.text.step(tokens, states, trace, head=head, choosing=choosing)
        return Verification(list(states), [list(ids) for ids in tokens], cu_seqlens, hidden, logits, chosen, trace)

    def draft_and_verify(self, wanted: Drafting, before: Verification | None = None) -> Verification:
        """`draft` at least one for one sequence, and `verify` the token that comes next, the last of its tokens, with
        these drafts; with logits or chosen tokens. before: a verification that has been counted and is to be written
        first."""
        assert self.mtp is not None
        w, rows = wanted, 1 + wanted.depth
        with self._lock:
            self._set_threads()
            trace, choosing = self._take_trace(rows), w.sampler.drafting(rows)
            drafts, hidden, logits, chosen = self.mtp.draft_at_once(
                w.hidden, w.tokens, w.state, w.first, choosing, w.depth, trace, _owed(before),
                chooses=w.sampler.logprobs is None,
            )  # fmt: skip
            assert hidden is not None  # there is a trace
            if before is not None:
                self._traces[before.trace.shape[1]] = before.trace
        tokens = [[w.tokens[-1], *drafts]]
        return Verification([w.state], tokens, row_bounds(rows), hidden, logits, chosen, trace)

    def commit(self, verification: Verification, counts: Sequence[int]) -> None:
        """Advance each state by its first counts[b] tokens (0 to all), bit for bit as `step` would have. Once per
        verification, and only while the states are where they were when it was made."""
        self.count(verification, counts)
        self.write(verification)

    def count(self, verification: Verification, counts: Sequence[int]) -> None:
        """The first half of `commit`, which computes nothing: the states have these tokens, and nobody may use them
        before `write`."""
        v = verification
        v.counts = row_counts(*counts)
        self.text.count(v.states, counts)
        for state, ids, n in zip(v.states, v.tokens, counts, strict=True):
            state.token_ids += ids[:n]

    def write(self, verification: Verification) -> None:
        """The other half."""
        v = verification
        assert v.counts is not None
        with self._lock:
            self._set_threads()
            self.text.write(v.states, v.cu_seqlens, v.counts, v.trace)
            self._traces[v.trace.shape[1]] = v.trace
        for state in v.states:
            state.intact = True

    def _take_trace(self, rows: int) -> np.ndarray:
        """A trace of `rows` rows, one that was used before if there is one."""
        trace = self._traces.pop(rows, None)
        if trace is None:
            c = self.text.config
            while len(self._traces) >= MAX_TRACES:
                self._traces.pop(next(iter(self._traces)))
            trace = self._zeros((c.num_delta_layers, rows, c.delta_trace_width), np.float32)
        return trace

    def draft(self, wanted: Sequence[Drafting]) -> list[list[int]]:
        """Drafts of the MTP layer for several sequences at once, each as many as it wants."""
        assert self.mtp is not None
        with self._lock:
            self._set_threads()
            if len(wanted) == 1 and wanted[0].depth:
                w = wanted[0]
                choosing = w.sampler.drafting(1 + w.depth)
                return [self.mtp.draft_at_once(w.hidden, w.tokens, w.state, w.first, choosing, w.depth)[0]]
            m = self.mtp.extend(
                wanted[0].hidden if len(wanted) == 1 else self.joined(w.hidden for w in wanted),
                [w.tokens for w in wanted],
                [w.state for w in wanted],
                [w.first for w in wanted],
                None if any(w.depth for w in wanted) else 0,
            )
            ends = row_bounds(*(len(w.tokens) for w in wanted))[1:]
            drafts: list[list[int]] = [[] for _ in wanted]
            alike: dict[Choice, list[int]] = {}  # sequences that choose alike are drafted for together
            for b, w in enumerate(wanted):
                if w.depth:
                    alike.setdefault(w.sampler.choice, []).append(b)
            for group in alike.values():
                depth = max(wanted[b].depth for b in group)
                choosing = drafting_together([wanted[b].sampler for b in group], depth)
                made, _ = self.mtp.draft(m[ends[group] - 1], [wanted[b].state for b in group], choosing, depth)
                for b, ids in zip(group, made, strict=True):
                    drafts[b] = ids[: wanted[b].depth]
            return drafts

    def joined(self, rows: Iterable[np.ndarray]) -> np.ndarray:
        """Rows [n, H] one after another, where the op set has its arrays."""
        return self._concatenate(list(rows), axis=0)

    def _read_mtp(self, reader: PromptReader, end: int, x: np.ndarray, hidden: np.ndarray) -> None:
        """The MTP layer's entries for tokens at - 1 .. end - 2 of a prompt that has been read up to `at`, whose rows
        at .. end - 1 were x and became `hidden`; where the hidden row before these is not known, one less."""
        assert self.mtp is not None
        start = reader.at
        if reader.last is None:
            start, x, rows = start + 1, x[1:], hidden[:-1]
        else:
            rows = self.joined([reader.last, hidden[:-1]])
        if not len(rows):
            return
        first = reader.state.length - len(x) - 1
        positions = reader.positions
        places = np.concatenate([positions[:1] - 1, positions])[start:end]  # before the prompt there was some text
        self.mtp.read(rows, x, places, reader.state, first)
