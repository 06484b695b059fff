"""Which tokens may come next, and how many of them are worth verifying? Drafts of one sequence, from the text so far or
from the MTP layer, and the choice of how many: by the measured cost of a step and the acceptance seen so far.

A draft is accepted where it is the token that the sampler chooses from the model's own row, with the random number it
would have used anyway. Tokens are therefore those of plain decoding, one by one, greedy or sampled, whatever is drafted
and whenever; a draft d is accepted with its probability p(d), as rejection sampling accepts a one-hot draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .costs import WORTHWHILE, Acceptance, Costs
from .lookup import LOOKUP_DEPTH, MATCHES, Lookup

if TYPE_CHECKING:
    import numpy as np

    from ..model.state import State
    from .runner import Runner
    from .sampling import Sampler

MODES = ("auto", "mtp", "lookup", "off")
MTP_DEPTH = 4
PENDING_ROWS = 64  # hidden rows that wait for the MTP layer before their entries are made
KEPT_ROWS = 32  # rows it has seen at least before it drafts again, where it had not been of use for long
MOST_RESTS = 32  # steps after which "auto" thinks again whether the MTP layer's drafts would pay
FIRST_RESTS = 15  # the same in the beginning, where it rested in the sequence before
SAMPLE = 8  # while nothing changes, the time of one step of so many is recorded
# A look at the text, and a new choice, take so many seconds. While it rests they may take this share of the time, but
# there is one in so many steps.
LOOK_SECONDS, LOOK_SHARE, MOST_BLIND = 3e-5, 0.005, 128


@dataclass(slots=True)
class Drafting:
    """What the MTP layer needs to draft for one sequence: the hidden rows [n, H] (before the final norm) of tokens
    first .. first + n - 1, the token after each, and how many drafts are wanted (0: none, only keep the layer's entries
    up to date). sampler: chooses them."""

    state: State
    first: int
    hidden: np.ndarray
    tokens: list[int]
    depth: int
    sampler: Sampler


class Speculator:
    """Drafts for one sequence.

    drafted, accepted  counts of drafts so far
    depth              a fixed number of drafts per step instead of the measured choice (for tests and benchmarks)
    may_rest           whether there may be steps without drafts though there are some
    """

    def __init__(self, runner: Runner, sampler: Sampler, prompt_ids: Iterable[int], mode: str) -> None:
        """mode: one of MODES; "mtp" and "auto" use the runner's MTP layer, "auto" only where there is one."""
        self._runner = runner
        self._sampler = sampler
        self._mtp = runner.mtp is not None and mode in ("auto", "mtp")
        self._lookup = Lookup(prompt_ids) if mode in ("auto", "lookup") else None
        self.may_rest = mode == "auto"
        self._costs = runner.costs
        before: Sequence[Acceptance | None] = runner.acceptances or [None] * (1 + len(MATCHES))
        depths = [MTP_DEPTH, *(LOOKUP_DEPTH for _ in MATCHES)]
        self._sources = [Acceptance(depth, of) for depth, of in zip(depths, before, strict=True)]
        self._chosen: int | None = None  # index into _sources
        self._step = 0  # how many have been recorded
        rests = runner.rests if self.may_rest else 0
        self._blind = self._blind_steps() if rests else 1
        # How many steps remain, and how many there were, in which nothing is chosen anew: few in the beginning, unless
        # they are so short that a look is dear
        self._rest = self._rests = min(rests, FIRST_RESTS if self._blind == 1 else MOST_RESTS - 1)
        self._wrote = False  # the step before had drafts: the next plain step writes what became of them
        self._in_use = False  # the MTP layer has seen rows of this sequence
        self._offered = 0
        self._match: tuple[int, int] | None = None
        self._keeps = self._mtp  # whether rows are kept for the MTP layer; not where it has not been of use for long
        self._pending: list[Any] = []  # hidden rows that it has not seen
        self._tokens: list[int] = []  # the token after each of them
        self.depth: int | None = runner.fixed_depth
        self.drafted = 0
        self.accepted = 0

    @property
    def uses_mtp(self) -> bool:
        """Whether the MTP layer's entries have to be kept up to date."""
        if self._mtp and self.may_rest and self.depth is None:
            self._mtp = self._costs.can_pay(MTP_DEPTH)
            if not self._mtp:
                self._keeps, self._pending, self._tokens = False, [], []
        return self._mtp

    def observe(self, hidden: Any, tokens: list[int]) -> None:
        """hidden [n, H] (before the final norm): rows of the last n tokens of the state; tokens: what follows each."""
        if self._lookup is not None:
            self._lookup.ids += tokens
        if self._keeps and tokens:
            self._pending.append(hidden)
            self._tokens += tokens

    def draft(self, state: State, room: int) -> list[int] | Drafting:
        """At most `room` drafts for what follows the tokens that have been observed, or what the MTP layer needs to
        make them; [] for a plain step."""
        match = self._lookup.find() if self._lookup is not None else None
        if match is None and self._rest:
            self._rest -= 1
            return self._plan(state, 0, 0)
        source, depth = self._choose(match, room)
        self._rests = min(2 * self._rests + 1, MOST_RESTS) if self._costs.known and not depth else 0
        self._rest, self._blind = 0, 1
        if depth and not source and not self._keeps:
            self._keeps, self._rest, depth = True, KEPT_ROWS, 0  # the layer needs what comes before
        elif self._rests and self.may_rest:
            self._rest = self._rests
            if self._rests == MOST_RESTS:
                self._rest *= min(4, self._blind_steps())
                self._keeps, self._pending, self._tokens = False, [], []
        if self._rest:
            self._blind = self._blind_steps()
            if self._blind > 1 and self._rest % self._blind == 0:
                self._rest -= 1  # it has just looked
        self._match = match
        return self._plan(state, source, depth)

    def passes(self, hidden: Any, token: int, seconds: float | None) -> bool:
        """Whether nothing is to be done before a plain step that follows a plain one, but to observe what that one has
        brought: so it is in most steps while it rests, which cost next to nothing for that reason."""
        if self._rest % self._blind == 0:
            return False
        self._rest -= 1
        self.learn(0, 0, seconds)
        if self._lookup is not None:
            self._lookup.ids.append(token)
        if self._keeps:
            self._pending.append(hidden)
            self._tokens.append(token)
        return True

    @property
    def measures(self) -> bool:
        """Whether the next step's time is worth knowing: not always where nothing changes."""
        return self._blind > 1 or self._step % SAMPLE == 0 or not (self._rest or self._costs.settled)

    def learn(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """What became of the drafts, and how long they and the step took with logits and commit, if that is known."""
        if not drafted:
            self._step += 1
            if seconds is not None and not self._wrote:
                self._costs.record_step(1, seconds)
            self._wrote = False
            return
        self._wrote = True
        if seconds is not None:
            if self._chosen == 0:
                self._costs.record_round(drafted, seconds)
            else:
                self._costs.record_step(drafted + 1, seconds)
        self.record(drafted, accepted)

    def record(self, drafted: int, accepted: int) -> None:
        """What became of the drafts."""
        self._step += 1
        if drafted and self._chosen is not None:
            self._sources[self._chosen].record(drafted, accepted, self._step)
            self.count(drafted, accepted)

    def count(self, drafted: int, accepted: int) -> None:
        """Drafts of a step that ended early, and how many of them had been accepted: nothing is learnt from it."""
        self.drafted += drafted
        self.accepted += accepted

    def close(self, state: State) -> None:
        """Bring the MTP layer's entries up to date, if it is in use: `state` may be kept, and gone on with later."""
        self._runner.acceptances, self._runner.rests = self._sources, self._rests
        if self._in_use or not self.may_rest:
            self._catch_up(state, state.length - 1)

    def _catch_up(self, state: State, end: int) -> None:
        """Make the entries that wait, the last for token end - 1."""
        if self._tokens:
            self._runner.draft([self._drafting(state, end, 0)])

    def _blind_steps(self) -> int:
        """In one of how many steps it looks at the text while it rests: in each, unless they are very short."""
        return max(1, min(MOST_BLIND, int(LOOK_SECONDS / (LOOK_SHARE * self._costs.step(1)))))

    def _plan(self, state: State, source: int, depth: int) -> list[int] | Drafting:
        """`depth` drafts of a source, or what the MTP layer needs to make them."""
        self._chosen = source if depth else None
        if depth and not source:
            return self._drafting(state, state.length, depth)
        if len(self._tokens) >= PENDING_ROWS and self.uses_mtp:
            self._catch_up(state, state.length)
        if not depth:
            return []
        assert self._lookup is not None
        assert self._match is not None
        return self._lookup.drafts(self._match[1], depth)

    def _drafting(self, state: State, end: int, depth: int) -> Drafting:
        """`depth` drafts after token `end`, whose hidden row is the last one that waits; nothing waits any more."""
        rows = self._pending[0] if len(self._pending) == 1 else self._runner.joined(self._pending)
        wanted = Drafting(state, end - len(self._tokens), rows, self._tokens, depth, self._sampler)
        self._pending, self._tokens, self._in_use = [], [], True
        return wanted

    def _choose(self, match: tuple[int, int] | None, room: int) -> tuple[int, int]:
        """(index of a source, number of drafts): the pair that promises the most tokens per second."""
        if room < 1:
            return 0, 0
        if self.depth is not None:
            if match is not None:
                return 1 + match[0], min(self.depth, room, LOOKUP_DEPTH)
            return 0, min(self.depth, room, MTP_DEPTH) if self._mtp else 0
        costs = self._costs
        if not costs.known:
            return 0, 0  # nothing can be compared with
        best, chosen = WORTHWHILE / costs.step(1) if self.may_rest else 0.0, (0, 0)
        if self._mtp:
            seconds = costs.rounds(MTP_DEPTH)
            for depth, tokens in enumerate(islice(self._sources[0].expected(self._step), room), 1):
                if tokens > best * seconds[depth]:
                    best, chosen = tokens / seconds[depth], (0, depth)
        if match is not None:
            seconds, source = costs.steps(1 + LOOKUP_DEPTH), 1 + match[0]
            for depth, tokens in enumerate(islice(self._sources[source].expected(self._step), room), 1):
                if tokens > best * seconds[depth + 1]:
                    best, chosen = tokens / seconds[depth + 1], (source, depth)
        return chosen

    # ------------------------------------------------------------------------------- several sequences in one step

    def offers(self, room: int) -> list[float]:
        """Tokens that a step is expected to give with 1, 2, ... of the drafts that promise most, at most `room`; []
        without any. `prepare` then takes as many of these as are wanted."""
        self._match = self._lookup.find() if self._lookup is not None else None
        sources = ([0] if self._mtp else []) + ([] if self._match is None else [1 + self._match[0]])
        if room < 1 or not sources:
            return []
        if self.depth is not None:
            self._offered = sources[-1]
            return [1.0] * min(room, LOOKUP_DEPTH if self._offered else MTP_DEPTH)
        self._offered = max(sources, key=lambda source: (self._sources[source].expected(self._step)[0], source))
        return self._sources[self._offered].expected(self._step)[:room]

    def prepare(self, state: State, depth: int) -> list[int] | Drafting:
        """`depth` drafts of what was offered last, or what the MTP layer needs to make them."""
        if not depth and len(self._tokens) >= PENDING_ROWS and self.uses_mtp:
            self._chosen = None
            return self._drafting(state, state.length, 0)  # together with those of others
        return self._plan(state, self._offered, depth)


MOST_ROWS = 32  # of all sequences in one step, drafts included


def share_rows(offers: Sequence[Sequence[float]], must: Sequence[bool], sequences: int, costs: Costs) -> list[int]:
    """How many drafts each sequence gets so that all together make the most tokens per second.

    offers: what each expects of 1, 2, ... drafts (see Speculator.offers); must: whether it has to take one; sequences:
    how many there are in the step, those without offers included; costs: of steps of so many sequences, by 1 + drafts.
    """
    gains = [
        (must[i] and depth == 0, tokens - (offer[depth - 1] if depth else 1.0), i)
        for i, offer in enumerate(offers)
        for depth, tokens in enumerate(offer)
    ]
    gains.sort(key=lambda gain: (-gain[0], -gain[1]))  # stable: of one sequence in the order of depth
    gains = gains[: max(0, MOST_ROWS - sequences)]
    forced = sum(gain[0] for gain in gains)
    if not costs.known:
        return [0] * len(offers)  # nothing can be compared with
    best, taken, tokens = 0.0, forced, float(sequences)
    depths = [0] * len(offers)
    for drafts in range(len(gains) + 1):
        if drafts:
            _, gain, i = gains[drafts - 1]
            tokens += gain
            depths[i] += 1
        if drafts >= forced:
            seconds = costs.step(1 + drafts) + (costs.draft(max(depths)) if drafts else 0.0)
            if tokens / seconds > best * (WORTHWHILE if taken == 0 and drafts else 1.0):
                best, taken = tokens / seconds, drafts
    depths = [0] * len(offers)
    for _, _, i in gains[:taken]:
        depths[i] += 1
    return depths


def draft_together(
    runner: Runner, wanted: Sequence[tuple[Speculator, State, int]], sequences: int, costs: Costs
) -> list[list[int]]:
    """Drafts of each speculator for what follows the tokens that it has observed, at most so many. sequences, costs:
    see share_rows."""
    offers = [speculator.offers(room) for speculator, _, room in wanted]
    if runner.fixed_depth is not None:
        depths = [min(runner.fixed_depth, len(offer)) for offer in offers]
    else:
        depths = share_rows(offers, [not speculator.may_rest for speculator, _, _ in wanted], sequences, costs)
    plans = [speculator.prepare(state, depth) for (speculator, state, _), depth in zip(wanted, depths, strict=True)]
    draftings = [plan for plan in plans if not isinstance(plan, list)]
    if not draftings:
        return [plan for plan in plans if isinstance(plan, list)]
    began, recordings = perf_counter(), runner.recordings
    made = iter(runner.draft(draftings))
    depth = max(drafting.depth for drafting in draftings)
    if depth and runner.recordings == recordings:
        costs.record_draft(depth, perf_counter() - began)
    return [plan if isinstance(plan, list) else next(made) for plan in plans]
