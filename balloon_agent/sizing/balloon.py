"""The balloon: walks towards a size in steps. Knows the device and the sources, and keeps the ledger between them.

The order of things in a step is what keeps the guest alive, and is spelled out in ``_hand_over`` and ``_deflate``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from balloon_agent.errors import (
    BalloonError,
    GaveWay,
    HolderLost,
    Shortage,
    StillHeld,
    Unfinished,
)
from balloon_agent.frames import FRAME, HUGE
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from balloon_agent.memory.sources.source import (
    FINEST,
    MOST_RUNS,
    QUICKEST_FIRST,
    Source,
)
from balloon_agent.size import format_size

from .posting import Host, Posting

STEP = 64 << 20
# Going down, nothing is zeroed meanwhile and the host has next to nothing to do.
STEP_DOWN = 4 << 30
# And so many extents: each that is announced needs a descriptor of this process meanwhile.
MOST_EXTENTS = 256
# Rounds of taking memory in place of a block that has to go back. A guest with a page to spare at a time would need 32768, and
# nothing else is heard meanwhile.
MOST_ROUNDS = 256
# Where a step's time goes. ``take`` is all of taking, the sources' own phases included: see ``Source.seconds``.
PHASES = ("free_hidden", "take", "ledger", "verify", "give_back")
# The name of hidden memory among the notes of the sources.
HIDDEN = "hidden"
# More bytes than can hide anywhere.
ALL = 1 << 62
# A source that had nothing is asked again after so many seconds.
SOURCE_REST = 2.0
_log = logging.getLogger(__name__)


class HiddenMemory(Protocol):
    """Memory that no process uses, and that the kernel does not count as free. ``freed`` counts bytes by each means."""

    @property
    def freed(self) -> Mapping[str, int]: ...

    @property
    def note(self) -> str | None:
        """Why memory still hides, in words."""
        ...

    def free(self, wanted: int) -> bool:
        """Free some of it: a step towards ``wanted`` bytes. True if there may be more to spare now, or after the next step."""
        ...


@dataclass
class Counters:
    """What has happened since the start; only ever goes up. Bytes, seconds, numbers."""

    inflated: int = 0
    deflated: int = 0
    moved_extents: int = 0
    holders_lost: int = 0
    blocks_lost: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


@dataclass(frozen=True)
class Step:
    """What one step did: whether it changed anything, and if the balloon fell short, why."""

    moved: bool
    shortfall: str | None = None


class Balloon:
    """Keeps the ledger: while it steps, nothing else adds to that or takes from it.

    ``sources`` are all there are, coarse to fine; memory is taken from those that are ``enabled``, in that order.
    ``spare`` tells how many bytes the guest could do without, ``reserve`` how many of them inflating must leave.
    ``hidden`` frees memory that is neither used nor free. It goes before ``caches``, the bytes in the last answer of ``spare``
    that the guest would have to evict.
    ``changed`` is called after each step.
    ``boundary`` and ``cuts`` are Posting's.
    """

    def __init__(
        self,
        host: Host,
        sources: Sequence[Source],
        enabled: Sequence[str],
        ledger: Ledger,
        spare: Callable[[], int],
        reserve: int,
        boundary: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        cuts: Sequence[int] = (),
        hidden: HiddenMemory | None = None,
        caches: Callable[[], int] = lambda: 0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._host = host
        self._sources = {source.name: source for source in sources}
        self.enable(enabled)
        self._finest_first = [source.name for source in reversed(sources)]
        self.ledger = ledger
        self._spare = spare
        self.reserve = reserve
        self._posting = Posting(host, boundary, cuts, clock)
        self._hidden = hidden
        self._caches = caches
        # Before single pages are taken, all that hides is freed, step by step.
        self._searches = False
        self._changed = changed
        self._clock = clock
        self._rests: dict[str, float] = {}
        self.counters = Counters()
        self.notes: dict[str, str] = {}
        # Taken, but never posted, and not in the ledger: where the device failed just then.
        self._unposted: list[tuple[Source, Extent]] = []
        # In the ledger, but the device that was just reset has not been told of it yet.
        self._unannounced: list[Extent] = []
        self._lost_holders: set[str] = set()

    def enable(self, names: Sequence[str]) -> None:
        """Take memory from these, in this order, from now on."""
        self._enabled = [self._sources[name] for name in names]

    @property
    def actual(self) -> int:
        """Bytes in the balloon."""
        return self.ledger.size

    def announce(self) -> Iterator[None]:
        """Tell a device that was just reset what the balloon holds already: all of it is posted again, a step each time round.

        What was on its way when an earlier agent died, or the device failed, may not have arrived; posting a held frame twice
        does no harm. What is no longer held, or not where it was, is struck out instead. OSError if it cannot be told what is
        held: then it is to be begun again. Until it has come to its end nothing but ``give_way`` may be done with the balloon.
        """
        # Since the reset nothing is on its way. From here on only the next step is, holder by holder: the rest is on the OOM
        # fuse where the host bears a loss (see ``Source.guard``), and what it was not told of it does not lose.
        for extent in self.ledger:
            self._sources[extent.source].settle(extent)
        for source, extent in self._unposted:
            source.settle(extent)
        self._unannounced = sorted(self.ledger, key=lambda extent: extent.holder or "")
        self.rest()
        while self._unannounced:
            batch = self._step_of(self._unannounced, STEP)
            sound = [extent for extent in batch if extent.name in self.ledger and self._is_sound(extent)]
            del self._unannounced[: len(batch)]
            self._tell(sound)
            self.rest()
            yield
        self.drop_unposted()
        self._host.set_actual(self.actual)

    def give_way(self, goal: int, floor: int) -> bool:
        """While the balloon is being announced: give back what the host was not told of yet, down to ``goal`` bytes in all.

        The host need not hear of that either. What is quickest goes first, a step at most, and nothing that would leave less
        than ``floor`` bytes. Whether anything went back.
        """
        excess, room = self.actual - goal, self.actual - floor
        chosen: list[Extent] = []
        for extent in sorted(self._unannounced, key=lambda extent: QUICKEST_FIRST.index(extent.source)):
            if excess <= 0 or len(chosen) == MOST_EXTENTS:
                break
            if extent.size <= room:
                chosen.append(extent)
                excess, room = excess - extent.size, room - extent.size
        before = self.actual
        self._give_back(chosen)
        # What the guest did not take has to be announced after all.
        self._unannounced = [extent for extent in self._unannounced if extent.name in self.ledger]
        self._changed()
        return self.actual < before

    def drop_unposted(self, *, for_good: bool = False) -> None:
        """Let go of what was taken and could not be posted. Only after the device has been reset, and told of the rest.

        ``for_good`` if nobody will drive the device after this.
        """
        while self._unposted:
            source, extent = self._unposted[-1]
            is_back = self._let_go(source, extent)
            self._unposted.pop()
            if not is_back and not for_good:
                # Then it is the balloon's, as what the guest does not take back after a deflate.
                self.ledger.add(extent)
                self._keep(source, extent)

    def free_unposted(self) -> None:
        """As ``drop_unposted``, where there is no device that could be told: what does not come back waits for the next one."""
        left: list[tuple[Source, Extent]] = []
        while self._unposted:
            source, extent = self._unposted[-1]
            try:
                is_back = self._let_go(source, extent)
            except (BalloonError, OSError) as error:
                _log.error("%s does not come back yet: %s", extent.name, error)
                is_back = False
            self._unposted.pop()
            if not is_back:
                left.append((source, extent))
        self._unposted += left

    @property
    def hidden_freed(self) -> dict[str, int]:
        """Bytes of hidden memory that were freed since the start, by each means."""
        return {} if self._hidden is None else dict(self._hidden.freed)

    def keeps(self, holder: str) -> bool:
        """Whether a holder has anything that is the balloon's, posted or not."""
        return bool(self.ledger.of_holder(holder)) or any(extent.holder == holder for _, extent in self._unposted)

    def _is_sound(self, extent: Extent) -> bool:
        source = self._sources[extent.source]
        try:
            source.guard(extent)
            if source.in_place(extent):
                return True
        except HolderLost as error:
            _log.warning("%s: %s", extent.name, error)
            self.note_death(str(extent.holder))
        if extent.holder is None:
            self._count_lost([extent])
        else:
            _log.error("%s is not what it was: it is not the balloon's any more", extent.name)
        self._drop(source, extent)
        return False

    def step(self, goal: int, floor: int | None = None, *, quickly: bool = False) -> Step:
        """One step towards ``goal`` bytes. Errors of the device are the caller's: the ledger is right whatever happens.

        ``floor`` is what the balloon is not to fall below, if only for a moment; ``goal`` unless it is said. Whoever needs
        memory ``quickly`` gets what is quickest to give back, and otherwise what is finest, which is worth least to the host.
        """
        if self.actual == goal:
            return Step(moved=False)
        if self.actual < goal:
            step = self._inflate(goal - self.actual)
        else:
            order = QUICKEST_FIRST if quickly else self._finest_first
            step = self._deflate(self.actual - goal, goal if floor is None else min(floor, goal), order)
        self._changed()
        return step

    def rest(self) -> None:
        """Nothing is on its way. Where the host bears it, the OOM killer may have what is held before it kills anybody else."""
        for source in self._sources.values():
            source.rest(self._host.bears_loss)

    # -- up --------------------------------------------------------------------------------------------------------

    def _inflate(self, wanted: int, *, may_search: bool = True) -> Step:
        try:
            spare = self._spare()
        except OSError as error:
            return Step(False, f"it cannot be told how much the guest can spare: {error}")
        room = spare - self.reserve
        missing = wanted - (room - self._caches())
        seeks = may_search and (missing > 0 or self._searches)
        if seeks and self._finds_hidden(ALL if self._searches else missing):
            return Step(moved=True)
        if room < FRAME:
            return Step(
                False,
                f"the guest can spare {format_size(spare)}, and {format_size(self.reserve)} of it are kept in reserve",
            )
        for source in self._enabled:
            is_last_resort = may_search and source.name == FINEST and self._may_take(source, wanted, room)
            if is_last_resort and self._finds_hidden(ALL):
                # Huge pages with holes may be why free memory is that scattered: they are split first.
                self._searches = True
                return Step(moved=True)
            if (step := self._take_from(source, wanted, room)) is not None:
                return step
        return Step(
            False,
            "; ".join(f"{name}: {note}" for name, note in self.notes.items()) or f"{format_size(room)} can be spared",
        )

    def _may_take(self, source: Source, wanted: int, room: int) -> int:
        """Bytes to ask a source for; 0 while it rests."""
        rests = room <= 0 or self._rests.get(source.name, 0.0) > self._clock()
        return 0 if rests else source.portion(wanted, room, STEP)

    def _take_from(self, source: Source, wanted: int, room: int) -> Step | None:
        """A step by what one source has; None if it has nothing."""
        if not (size := self._may_take(source, wanted, room)):
            return None
        try:
            # For who needs memory while some is taken. What was taken before has been acknowledged, or is guarded yet.
            self.rest()
            with self._timing("take"):
                extents = source.take(size, of=min(wanted, room))
        except GaveWay as error:
            _log.info("%s: %s", source.name, error)
            return Step(False, f"{source.name}: {error}")
        except Unfinished as error:
            _log.info("%s: %s", source.name, error)
            return Step(moved=True)
        except (Shortage, HolderLost, OSError) as error:
            self._rest(source.name, SOURCE_REST, str(error))
            return None
        self.notes.pop(source.name, None)
        return self._hand_over(source, extents)

    def _finds_hidden(self, size: int) -> bool:
        """Have hidden memory freed, a step. True if the guest may have more to spare now, or after the next step."""
        if self._hidden is None:
            return False
        with self._timing("free_hidden"):
            found = self._hidden.free(size)
        self.notes.pop(HIDDEN, None)
        if self._hidden.note is not None:
            self.notes[HIDDEN] = self._hidden.note
        if self._searches and not found:
            # Sources that had nothing may have something now.
            self._rests = {source: until for source, until in self._rests.items() if until == math.inf}
            self._searches = False
        return found

    def _rest(self, source: str, seconds: float, why: str) -> None:
        self._rests[source] = self._clock() + seconds
        if self.notes.get(source) != why:
            _log.info("%s: %s", source, why)
        self.notes[source] = why

    def _hand_over(self, source: Source, extents: Sequence[Extent]) -> Step:
        # 1. In the ledger before the host hears of it: if anything fails from here on, the memory stays held.
        entered = 0
        try:
            with self._timing("ledger"):
                for extent in extents:
                    self._enter(extent)
                    entered += 1
        except BaseException:
            # The host may have these frames yet, as the other one's. So they are kept until it was reset.
            self._unposted += [(source, extent) for extent in extents[entered:]]
            raise
        # 2. to 4. To the host.
        shortfall = self._tell(extents)
        self.counters.inflated += sum(extent.size for extent in extents if extent.name in self.ledger)
        self._host.set_actual(self.actual)
        return Step(shortfall is None, shortfall)

    def _tell(self, extents: Sequence[Extent]) -> str | None:
        """Tell the host of extents that are in the ledger, and strike out those that turn out not to be ours.

        Returns why, in words, if the host may have discarded memory of the guest's.
        """
        # 2. To the host, of what is still ours.
        told = self._posting.inflate(extents, lambda extent: self._sources[extent.source].is_ours(extent))
        self._count_lost(told.unsaid)
        for extent in told.unsaid:
            # The guest took it back before the host was told.
            self._drop(self._sources[extent.source], extent)
        # 3. Is it still what we posted? With the pin it is; if not, the host has discarded somebody else's memory.
        moved, lost = told.doubtful, []
        for extent in told.whole:
            source = self._sources[extent.source]
            try:
                with self._timing("verify"):
                    in_place = source.in_place(extent)
            except HolderLost as error:
                # This process guards the frames until the death is dealt with as the event that it is: see holder_lost.
                _log.warning("%s", error)
                continue
            if in_place:
                # 4. The host has answered: from now on the holder alone guards it.
                source.settle(extent)
            elif extent.holder is None:
                # It was offline when the host had answered: what has become of it since did no harm.
                lost.append(extent.name)
            else:
                moved.append(extent)
        self.blocks_lost(lost)
        return self._withdraw(moved)

    def _enter(self, extent: Extent) -> None:
        try:
            self.ledger.add(extent)
        except ValueError:
            # A frame that is said to be somebody else's proves that it is not any more, though we have not heard of it yet: the
            # guest has lent it again.
            for held in self.ledger.overlapping(extent.runs):
                if held.name in self.ledger:
                    self._lost(held, extent)
            self.ledger.add(extent)

    def _lost(self, held: Extent, through: Extent) -> None:
        if held.holder is not None:
            _log.warning("holder %s must be dead: its frames have come back through %s", held.holder, through.name)
            self.holder_lost(held.holder)
            return
        _log.warning("the frames of %s have come back through %s", held.name, through.name)
        self.blocks_lost([held.name])

    def _withdraw(self, moved: Sequence[Extent]) -> str | None:
        """Take back what moved after it was posted: why, in words, or None. Its source is asked for nothing after that."""
        if not moved:
            return None
        names = ", ".join(extent.name for extent in moved)
        why = f"extent {names} moved after it was posted, so memory that is not ours may be lost: no more is taken here"
        self.counters.moved_extents += len(moved)
        for name in {extent.source for extent in moved}:
            _log.critical("%s: %s", name, why)
            self._rest(name, math.inf, why)
        for extent in moved:
            self._posting.deflate([extent])
            self._drop(self._sources[extent.source], extent)
        return why

    def _drop(self, source: Source, extent: Extent) -> None:
        """Strike out what is not what it should be, and let go of what is left of it."""
        self.ledger.remove(extent.name)
        self._let_go(source, extent)

    @staticmethod
    def _let_go(source: Source, extent: Extent) -> bool:
        """Give an extent back that is in no ledger. False if the guest provably did not take it."""
        problem = source.give_back([extent]).get(extent.name)
        if isinstance(problem, StillHeld):
            _log.error("%s: %s", extent.name, problem)
            return False
        if problem is not None:
            _log.debug("%s: %s", extent.name, problem)
        return True

    # -- down ------------------------------------------------------------------------------------------------------

    def _deflate(self, excess: int, floor: int, order: Sequence[str]) -> Step:
        extents = self._step_of(self.ledger.candidates(excess, order), STEP_DOWN)
        self._make_up_for(floor - self.actual + sum(extent.size for extent in extents))
        # That can have brought to light that one of them is lost.
        extents = [extent for extent in extents if extent.name in self.ledger]
        return self._return(extents)

    def _return(self, extents: Sequence[Extent]) -> Step:
        """Give back what is in the ledger, and tell the host before."""
        if not extents:
            return Step(moved=True)
        # 1. The host first: only its acknowledgement makes the frames ours again.
        self._posting.deflate(extents)
        # 2. To the guest, and out of the ledger.
        kept = self._give_back(extents)
        # 3. What the guest did not take stays in the ledger, and the host hears that it is in the balloon after all.
        for extent, _ in kept:
            self._keep(self._sources[extent.source], extent)
        self._host.set_actual(self.actual)
        return Step(len(kept) < len(extents), "; ".join(problem for _, problem in kept) or None)

    def _give_back(self, extents: Sequence[Extent]) -> list[tuple[Extent, str]]:
        """Give extents to the guest, and strike them out. Those that it did not take, and why, stay in the ledger."""
        by_source: dict[str, list[Extent]] = {}
        for extent in extents:
            by_source.setdefault(extent.source, []).append(extent)
        kept: list[tuple[Extent, str]] = []
        for name, group in by_source.items():
            with self._timing("give_back"):
                problems = self._sources[name].give_back(group)
            with self._timing("ledger"):
                for extent in group:
                    problem = problems.get(extent.name)
                    if isinstance(problem, StillHeld):
                        kept.append((extent, str(problem)))
                        continue
                    if problem is not None:
                        _log.warning("%s; its memory is the guest's", problem)
                    self.ledger.remove(extent.name)
                    self.counters.deflated += extent.size
        return kept

    def _keep(self, source: Source, extent: Extent) -> None:
        """Tell the host that an extent is in the balloon after all. Its guard is gone: from here on it needs one again."""
        try:
            source.guard(extent)
        except HolderLost as error:
            _log.warning("%s; its memory is the guest's", error)
            self.note_death(str(extent.holder))
            self._drop(source, extent)
            return
        self._tell([extent])

    def _make_up_for(self, too_much: int) -> None:
        """Take beforehand what a deflate will give back too much of, because a memory block cannot be divided.

        The host may forbid a balloon smaller than its target (spec 5.5.6.1), if only for a moment, and has no use for memory
        that comes and goes. Where the guest cannot spare so much, it gets the block all the same, and the rest is taken again.
        """
        goal = self.actual + too_much
        rounds = 0
        while too_much > 0 and self.actual < goal and rounds < MOST_ROUNDS:
            before = self.actual
            rounds += 1
            if not self._inflate(goal - before, may_search=False).moved or self.actual <= before:
                return

    @staticmethod
    def _step_of(extents: Iterable[Extent], most: int) -> list[Extent]:
        """As many as fit ``most`` bytes and MOST_RUNS, and one in any case: what is larger cannot be divided."""
        chosen: list[Extent] = []
        size = runs = 0
        for extent in extents:
            size += extent.size
            runs += len(extent.runs)
            if chosen and (size > most or runs > MOST_RUNS or len(chosen) == MOST_EXTENTS):
                break
            chosen.append(extent)
        return chosen

    def holder_lost(self, holder: str, *, tell_host: bool = True) -> int:
        """A holder has died: what it held is the guest's already. Strike it out, tell the host, return the bytes.

        ``tell_host`` is False where the device has been reset, and so knows of nothing.
        """
        extents = self.ledger.of_holder(holder)
        if not extents:
            return 0
        self.note_death(holder)
        return self._strike_out(extents, tell_host=tell_host)

    def blocks_lost(self, names: Iterable[str], *, tell_host: bool = True) -> int:
        """Somebody else has brought memory blocks online, or removed them: the extents of these names are the guest's already.

        As with ``holder_lost`` they are struck out, the host is told, and the bytes are returned.
        """
        extents = [self.ledger[name] for name in names if name in self.ledger]
        if not extents:
            return 0
        self._count_lost(extents)
        return self._strike_out(extents, tell_host=tell_host)

    def _count_lost(self, extents: Sequence[Extent]) -> None:
        self.counters.blocks_lost += len(extents)
        if extents:
            names = ", ".join(extent.name for extent in extents)
            _log.warning("%s: no longer offline, and not by us: the guest has it, and the balloon has not any more", names)

    def _strike_out(self, extents: Sequence[Extent], *, tell_host: bool) -> int:
        """Of what is the guest's already: tell the host if it is to be told, then forget it. Returns the bytes."""
        if tell_host:
            self._posting.deflate(extents)
        for extent in extents:
            # What was in flight was still guarded here: only now, after the host's answer, may the guest have it.
            self._drop(self._sources[extent.source], extent)
        if tell_host:
            self._host.set_actual(self.actual)
        return sum(extent.size for extent in extents)

    def note_death(self, holder: str) -> None:
        """Count a holder that died with memory of the balloon, once."""
        self._lost_holders.add(holder)
        self.counters.holders_lost = len(self._lost_holders)

    # -- instead ---------------------------------------------------------------------------------------------------

    @property
    def scattered(self) -> int:
        """Bytes in single pages that huge pages could take the place of."""
        return self.ledger.by_source().get(FINEST, 0) // HUGE * HUGE

    def coarsen(self) -> bool:
        """At rest: take coarser memory in the place of single pages, an extent at least. Whether that changed anything.

        The coarser first, so that the host has no less than it asks for at any time. Where that is not enough for any extent,
        or the guest cannot spare so much for the moment, all is as it was. The next steps put right what is too little or too
        much.
        """
        before, names = self.actual, {extent.name for extent in self.ledger}
        try:
            room = self._spare() - self.reserve
            in_huge = (-(-extent.size // HUGE) * HUGE for extent in self.ledger if extent.source == FINEST)
            goal = before + max((size for size in in_huge if size <= room), default=0)
            for source in self._enabled:
                grows = source.name != FINEST
                while grows and self.actual < goal:
                    taken = self.actual
                    step = self._take_from(source, goal - taken, self._spare() - self.reserve)
                    grows = self.actual > taken and (step is None or step.moved)
        except OSError as error:
            _log.debug("it cannot be told how much the guest can spare: %s", error)
        exchanged = self.ledger.fitting(self.actual - before, FINEST)
        changed = exchanged or [extent for extent in self.ledger if extent.name not in names]
        if changed:
            self._return(changed)
            self._changed()
        return bool(exchanged)

    # -- both ------------------------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        """Time spent by phase: this object's, and the sources' own."""
        seconds = self.counters.seconds | {"post": self._posting.seconds}
        for source in self._sources.values():
            for phase, spent in source.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        return seconds

    @contextmanager
    def _timing(self, phase: str) -> Iterator[None]:
        begin = self._clock()
        try:
            yield
        finally:
            self.counters.seconds[phase] += self._clock() - begin
