"""How are prompts read beside sequences that decode? One chunk a step, no longer than these can wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import prefix
from .prefill import read_pass

if TYPE_CHECKING:
    from ..model.state import State
    from .batch import RunningBatch
    from .prefill import PromptReader
    from .runner import Runner
    from .sequence import ScheduledSequence


class ChunkedPrefill:
    """Reads the prompts of a batch.

    Chunks go in turn to the prompt that came first and to the one that has the least left; a prompt that begins like
    one that is being read waits for that one's checkpoint instead of reading the same again.
    """

    def __init__(self, runner: Runner, blank: Callable[[], State], tokens: int) -> None:
        """blank: makes an empty state. tokens: rows of a chunk at most, as long as somebody decodes; on an op set that
        is not SPLIT_INVARIANT chunks reach from one split point of the prompt to the next."""
        self._runner = runner
        self._blank = blank
        self._tokens = tokens
        self._oldest_first = True

    def step(self, batch: RunningBatch) -> list[ScheduledSequence]:
        """Read one chunk; the sequences whose prompt is complete with it."""
        reading = [sequence for sequence in batch.running if sequence.reads]
        if not reading:
            return []
        alone = len(reading) == len(batch.running)
        reading = self._in_turn(reading)
        chunks = self._plan(batch, reading, alone)
        if chunks:
            with batch.blaming([sequence for sequence, _, _ in chunks]):
                if len(chunks) == 1 and self._runner.ops.SPLIT_INVARIANT:
                    ((sequence, reader, end),) = chunks
                    read_pass(self._runner, reader, sequence.job.reading, end - reader.at)
                    sequence.has_read(reader.at)
                else:
                    self._runner.read([(reader, end) for _, reader, end in chunks])
                    for sequence, reader, end in chunks:
                        if sequence.pauses[0] == (end, True):
                            sequence.job.reading.mark(sequence.state, reader.last)
                        sequence.has_read(end)
        return [sequence for sequence in reading if not sequence.reads]

    def _in_turn(self, reading: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Whose turn it is first: the oldest, or the one that has the least left."""
        if not self._oldest_first:
            least = min(reading, key=lambda sequence: sequence.left)
            reading = [least, *(sequence for sequence in reading if sequence is not least)]
        self._oldest_first = not self._oldest_first
        return reading

    def _plan(
        self, batch: RunningBatch, reading: list[ScheduledSequence], alone: bool
    ) -> list[tuple[ScheduledSequence, PromptReader, int]]:
        """What this step reads: of whose prompt, by its reader, up to which token. The pictures up to there have been
        encoded and there is room in the states. alone: nobody decodes meanwhile."""
        invariant = self._runner.ops.SPLIT_INVARIANT
        room = prefix.PREFILL_TOKENS if alone or not invariant else self._tokens
        uncut = invariant and len(reading) == 1  # a pass over one prompt can leave checkpoints on the way
        chunks: list[tuple[ScheduledSequence, PromptReader, int]] = []
        for sequence in reading:
            with batch.blaming([sequence]):
                reader = sequence.reader or self._begin(batch, sequence)
                if reader is None or not sequence.pauses:  # it waits for another, or the cache held all of it
                    continue
                end, _ = sequence.pauses[-1 if uncut else 0]
                if invariant:
                    end = min(end, reader.at + room)
                unseen = reader.unseen(end)
                if unseen and not alone:
                    if not chunks:  # a picture takes the time of a chunk
                        reader.see(unseen[0])
                        room = 0
                    break
                reader.look(end)
                sequence.state.reserve(end - reader.at + sequence.state.length)
                chunks.append((sequence, reader, end))
                room -= end - reader.at
            if room <= 0 or (chunks and not invariant):
                break
        return chunks

    def _begin(self, batch: RunningBatch, sequence: ScheduledSequence) -> PromptReader | None:
        """Let it take what the cache holds of its prompt. None if another one is about to leave more there."""
        reading = sequence.job.reading
        ahead = max(
            (
                reading.gains(other.job.reading, other.reader.at)
                for other in batch.running
                if other.reader is not None and other.pauses
            ),
            default=0,
        )
        if ahead:
            reading.look()
            if ahead > reading.cached_tokens:
                return None
        return sequence.begin(self._runner, self._blank)
