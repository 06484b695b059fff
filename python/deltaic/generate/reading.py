"""From where is a prompt read, and what does its reading leave in the cache?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..model.state import State, copy_array
from .cache import Checkpoint, PrefixCache
from .prefix import Ints, PrefixDigest, image_places, sequence_keys, shared_length, split_points

if TYPE_CHECKING:
    from ..chat.prompt import Prompt


class Reading:
    """One prompt on its way through the cache: where its reading starts, and which checkpoints it leaves behind.

    cached_tokens, miss_reason  known after `begin`
    stores                      whether it leaves checkpoints at all
    kept                        the newest checkpoints [before the last message, end of prompt, end of generation]
    """

    def __init__(
        self,
        cache: PrefixCache,
        prompt: Prompt,
        *,
        border_id: int | None,
        image_token_id: int | None,
        split_invariant: bool,
        canonical: bool = True,
        also: Sequence[Checkpoint] = (),
        keep: bool = False,
    ) -> None:
        """canonical: whether the prompt's positions are those that its tokens and pictures imply; if not it cannot be
        found or kept. also: checkpoints to look at beside the cache's. keep: make checkpoints even if the cache is off.
        """
        self.cached_tokens = 0
        self.miss_reason: str | None = None
        self.kept: list[Checkpoint] = []
        self._cache = cache
        self._also = also
        self._canonical = canonical
        self.stores = canonical and (keep or cache.budget > 0)
        self._prompt = prompt
        self._split_invariant = split_invariant
        self._border_id = border_id
        self._image_token_id = image_token_id
        self._generated = False

    def look(self) -> Checkpoint | None:
        """The checkpoint to go on from; sets `cached_tokens` and `miss_reason`."""
        self._digest = PrefixDigest(self._keys)
        if not self._canonical:
            self.miss_reason = "the positions of the prompt were made by hand"
            return None
        match = self._cache.find(self._keys, lambda c: c.generated or self._may_start_at(c.length), self._also)
        self.miss_reason = match.miss_reason
        if match.checkpoint is not None:
            self.cached_tokens = match.checkpoint.length
            self._generated = match.checkpoint.generated
        return match.checkpoint

    @cached_property
    def _points(self) -> list[tuple[int, bool]]:
        return split_points(self._prompt.token_ids, self._border_id)

    @cached_property
    def _keys(self) -> Ints:
        return sequence_keys(self._prompt.token_ids, image_places(self._prompt, self._image_token_id))

    def _may_start_at(self, position: int) -> bool:
        """Whether going on from a checkpoint there that was read repeats the cold computation."""
        return self._split_invariant or any(p == position for p, _ in self._points)

    def gains(self, other: Reading, at: int) -> int:
        """Up to which token this prompt need not be read once `other`, which has read `at` tokens of its own prompt,
        has left the checkpoints that are ahead of it; 0 if none of them serves."""
        if not (self.stores and other.stores):
            return 0
        shared = shared_length(self._keys, other._keys)
        ahead = (p for p, keep in reversed(other._points) if keep and at < p <= shared and self._may_start_at(p))
        return next(ahead, 0)

    def begin(self, blank: Callable[[], State]) -> tuple[State, Checkpoint | None]:
        """A state of its own that holds the first `cached_tokens` of the prompt, and the checkpoint it came from."""
        found = self.look()
        if found is None:
            return blank(), None
        if self.stores:
            self.kept.append(found)
        return found.state.fork(), found

    def pauses(self) -> list[tuple[int, bool]]:
        """The split points that are still ahead."""
        return [point for point in self._points if point[0] > self.cached_tokens]

    def mark(self, state: State, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a checkpoint of `state`, which has read the prompt up to one of the split points; hidden [1, H]."""
        if self.stores:
            n = state.length
            self._keep(Checkpoint(self._keys[:n], self._digest(n), state.fork(), copy_array(hidden), self._generated))

    def end(self, state: State, hidden: npt.NDArray[np.float32]) -> None:
        """Keep a checkpoint of `state`, which has gone on with generated tokens."""
        if self.stores and state.intact and state.length > len(self._keys):
            more = np.array(state.token_ids[len(self._keys) :], np.int64)
            keys = np.concatenate([self._keys, more])
            self._keep(Checkpoint(keys, PrefixDigest(keys)(len(keys)), state.fork(), copy_array(hidden), True))

    def _keep(self, checkpoint: Checkpoint) -> None:
        self._cache.add(checkpoint)
        self.kept = [*self.kept[-2:], checkpoint]
