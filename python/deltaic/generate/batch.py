"""What does one step compute for several sequences? One pass over the weights for the next tokens of all, a chunk of a
prompt, and one product with the head for everyone who has a new hidden row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import StateError
from .costs import Costs
from .sampling import choosing_together
from .speculate import draft_together

if TYPE_CHECKING:
    from .chunked_prefill import ChunkedPrefill
    from .runner import Runner, Verification
    from .sequence import ScheduledSequence


@dataclass(slots=True)
class _Decoded:
    """Sequences that have new hidden rows, what is to be committed when it is known which of their drafts are right,
    the tokens after all rows where they have been chosen, and the seconds of the pass; None: not worth knowing."""

    sequences: list[ScheduledSequence]
    verification: Verification | None = None
    chosen: list[int] | None = None
    seconds: float | None = None


class RunningBatch:
    """The sequences that run, in the order in which they started. An error of one ends it and no other."""

    def __init__(self, runner: Runner, prefill: ChunkedPrefill) -> None:
        self.running: list[ScheduledSequence] = []
        self._runner = runner
        self._prefill = prefill
        self._costs: dict[int, Costs] = {}

    @property
    def reserved_bytes(self) -> int:
        """Memory that is set aside for those that run."""
        return sum(sequence.nbytes for sequence in list(self.running))

    def end(self, sequence: ScheduledSequence, error: BaseException | None = None) -> None:
        """End a sequence, whether it runs or not."""
        if sequence in self.running:
            self.running.remove(sequence)
        sequence.end(error)

    @contextlib.contextmanager
    def blaming(self, sequences: Sequence[ScheduledSequence]) -> Iterator[None]:
        """An error inside ends these sequences."""
        try:
            yield
        except Exception as error:
            for sequence in sequences:
                self.end(sequence, error)

    def step(self) -> None:
        """Decode, read a chunk of a prompt, and choose the next tokens."""
        decoded = self._decode()
        self._choose(decoded, self._prefill.step(self))

    def _decode(self) -> _Decoded:
        """Feed the tokens that were chosen, and drafts of what may follow."""
        chosen = [sequence for sequence in self.running if sequence.token is not None]
        drafts = self._draft(chosen)
        began, recordings = perf_counter(), self._runner.recordings
        fed = []
        for sequence in chosen:
            with self.blaming([sequence]):
                sequence.state.reserve(sequence.state.length + 1 + len(drafts.get(sequence, [])))
                fed.append(sequence)
        if not fed:
            return _Decoded([])
        verification, chosen_ids = None, None
        with self.blaming(fed):
            tokens = [[sequence.token or 0, *drafts.get(sequence, [])] for sequence in fed]
            states = [sequence.state for sequence in fed]
            choosing = None  # where a prompt may end in this step, its row shares the head's pass over the weights
            if not any(sequence.reads for sequence in self.running):
                rows = ((sequence.job.sampler, len(ids)) for sequence, ids in zip(fed, tokens, strict=True))
                choosing = choosing_together(rows)
            head = choosing is not None
            if any(len(ids) > 1 for ids in tokens):
                verification = self._runner.verify(states, tokens, head=head, choosing=choosing)
                hidden, chosen_ids = verification.hidden, verification.chosen
            else:
                first = [ids[0] for ids in tokens]
                hidden, _, chosen_ids = self._runner.decode(first, states, head=head, choosing=choosing)
            row = 0
            for sequence, ids in zip(fed, tokens, strict=True):
                sequence.step(hidden[row : row + len(ids)], ids[1:])
                row += len(ids)
        seconds = perf_counter() - began if self._runner.recordings == recordings else None
        return _Decoded(fed, verification, chosen_ids, seconds)

    def _draft(self, chosen: list[ScheduledSequence]) -> dict[ScheduledSequence, list[int]]:
        """Drafts for the sequences that have a speculator."""
        drafting = [sequence for sequence in chosen if sequence.observe() is not None]
        if not drafting:
            return {}
        wanted = [(s.job.speculator, s.state, s.room - 1) for s in drafting if s.job.speculator is not None]
        try:
            drafts = draft_together(self._runner, wanted, len(chosen), self._costs_of(len(chosen)))
        except StateError:  # no memory for the MTP layer: plain steps need none
            return {}
        return dict(zip(drafting, drafts, strict=True))

    def _costs_of(self, sequences: int) -> Costs:
        """What steps of so many sequences cost, by 1 + the drafts of all."""
        return self._costs.setdefault(sequences, self._runner.costs if sequences == 1 else Costs())

    def _choose(self, decoded: _Decoded, read: list[ScheduledSequence]) -> None:
        """The next tokens of all sequences that have new hidden rows, from one product with the head where they have
        not been chosen."""
        ready = [sequence for sequence in (*decoded.sequences, *read) if not sequence.ended]
        if not ready:
            return
        began, chosen, sequences = perf_counter(), decoded.chosen, decoded.sequences
        logits = None
        if chosen is None:
            sequences = ready
            logits = self._runner.logits(self._runner.joined(sequence.hidden for sequence in ready))
            choosing = choosing_together((sequence.job.sampler, 1 + len(sequence.drafts)) for sequence in ready)
            if choosing is not None:
                chosen = self._runner.choose(logits, choosing, [[-1, *sequence.drafts] for sequence in ready])
            elif any(sequence.job.speculator is not None for sequence in ready):
                self._runner.wait()
        seconds = perf_counter() - began
        row = 0
        for sequence in sequences:
            end = row + len(sequence.drafts) + 1
            if not sequence.cancelled and not sequence.ended:
                with self.blaming([sequence]):
                    sequence.choose(None if logits is None else logits[row:end], chosen and chosen[row:end])
            row = end
        if decoded.verification is not None:
            began = perf_counter()
            self._runner.commit(decoded.verification, [sequence.row + 1 for sequence in decoded.sequences])
            seconds += perf_counter() - began
        if decoded.sequences and not read and decoded.seconds is not None:
            drafts = sum(len(sequence.drafts) for sequence in decoded.sequences)
            self._costs_of(len(decoded.sequences)).record_step(1 + drafts, decoded.seconds + seconds)
        for sequence in ready:
            if sequence.job.speculator is not None and not sequence.cancelled and sequence in decoded.sequences:
                sequence.job.speculator.record(len(sequence.drafts), sequence.row)
            if not sequence.ended and sequence.answer.complete:
                self.end(sequence)
