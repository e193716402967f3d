"""A guest for the model: its memory as a bitmap, and sources that take from it. All of it fake, with handles on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from balloon_agent.errors import BalloonError, HolderLost, Shortage
from balloon_agent.frames import FRAME, HUGE, Run
from balloon_agent.memory.ledger.ledger import Extent
from balloon_agent.memory.sources.source import Problems

MIB = 1 << 20
BLOCK = 128 * MIB
BLOCKS_A_STEP = 3


class FakeGuest:
    """Memory as a bitmap: who has which frame. Sources take from it; ``on_use`` hears of each frame that it begins to use."""

    def __init__(self, size: int = 1 << 30, boundary: int = BLOCK) -> None:
        self.free = bytearray(b"\1") * (size // FRAME)
        self.boundary = boundary // FRAME
        self.spare_frames = len(self.free)
        # Whether its kernel has given up reclaiming, and what was seen of that the last time that somebody looked.
        self.has_given_up = self.reclaim_is_hopeless = False
        self.on_use: Callable[[int, int], None] = lambda first, count: None
        self.on_seize: Callable[[int, int], None] = lambda first, count: None
        # What it got back from holders that died, at any time.
        self.seized = bytearray(len(self.free))

    def spare(self) -> int:
        self.reclaim_is_hopeless = self.has_given_up
        return min(self.spare_frames, self.free.count(1)) * FRAME

    def uses(self, first: int, count: int) -> bool:
        """Whether any of these frames is the guest's."""
        return 1 in self.free[first : first + count]

    def take(self, unit: int, count: int) -> list[Run]:
        """``count`` aligned pieces of ``unit`` bytes that are wholly free, from the top."""
        size = unit // FRAME
        runs: list[Run] = []
        for first in range(len(self.free) - size, -1, -size):
            if len(runs) == count:
                break
            if self.free.count(1, first, first + size) == size:
                self.free[first : first + size] = bytes(size)
                runs.append(Run(first, size))
        return runs

    def give_back(self, runs: Sequence[Run]) -> None:
        for run in runs:
            assert not any(self.free[run.first : run.end]), "a frame was given back that the guest has"
            self.on_use(run.first, run.count)
            self.free[run.first : run.end] = b"\1" * run.count

    def seize(self, runs: Sequence[Run]) -> None:
        """The guest has frames back that nobody gave: their holder died."""
        for run in runs:
            self.on_seize(run.first, run.count)
            self.free[run.first : run.end] = self.seized[run.first : run.end] = b"\1" * run.count


class FakeSource:
    """A source over the fake guest."""

    def __init__(self, name: str, unit: int, guest: FakeGuest) -> None:
        self.name = name
        self.guest = guest
        self.unit = unit
        self.made = 0
        self.problem: Exception | None = None
        self.give_back_problem: BalloonError | None = None
        self.verify_problem: Exception | None = None
        self.moved = False
        self.guarded: set[str] = set()
        self.holder = "h"
        self.dead: set[str] = set()
        self.seconds: dict[str, float] = {}

    def portion(self, wanted: int, room: int, step: int) -> int:
        if self.name == "blocks":
            return min(min(wanted, room) // self.unit, BLOCKS_A_STEP) * self.unit
        return min(wanted, room, step) // self.unit * self.unit

    def take(self, size: int, of: int = 0) -> list[Extent]:
        if self.problem is not None:
            raise self.problem
        runs = self.guest.take(self.unit, size // self.unit)
        if not runs:
            raise Shortage("nothing left")
        # A block is an extent of its own.
        pieces = [[run] for run in runs] if self.name == "blocks" else [runs]
        extents = []
        for piece in pieces:
            self.made += 1
            holder = None if self.name == "blocks" else self.holder
            extents.append(Extent(f"{self.name}-{self.made}", self.name, piece, holder))
            self.guarded.add(extents[-1].name)
        return extents

    def guard(self, extent: Extent) -> None:
        if extent.name in self.dead:
            raise HolderLost("its holder died")
        self.guarded.add(extent.name)

    def is_ours(self, extent: Extent) -> bool:
        # A block that somebody else has brought online; frames of a holder that died are guarded.
        return extent.holder is not None or extent.name not in self.dead

    def in_place(self, extent: Extent) -> bool:
        assert extent.name in self.guarded, "verified after the guard was gone"
        if extent.name in self.dead:
            raise HolderLost("its holder died")
        if self.verify_problem is not None:
            raise self.verify_problem
        return not self.moved

    def settle(self, extent: Extent) -> None:
        if extent.name in self.guarded and extent.name in self.dead:
            # Nobody else has kept it.
            self.guest.seize(extent.runs)
        self.guarded.discard(extent.name)

    def rest(self, may_be_lost: bool) -> None:
        assert not may_be_lost or self.guarded <= self.dead, "what is on its way would be on the fuse"

    def lose(self, extent: Extent) -> None:
        """Its holder dies. What is guarded stays out of the guest's hands until it is settled."""
        if extent.name not in self.dead:
            self.dead.add(extent.name)
            if extent.name not in self.guarded:
                self.guest.seize(extent.runs)

    def give_back(self, extents: Sequence[Extent]) -> Problems:
        problems: dict[str, BalloonError] = {}
        for extent in extents:
            self.settle(extent)
            if extent.name in self.dead:
                problems[extent.name] = HolderLost("its holder died")
            elif self.give_back_problem is not None:
                problems[extent.name] = self.give_back_problem
            else:
                self.guest.give_back(extent.runs)
        return problems


def sources(guest: FakeGuest, block: int = BLOCK) -> dict[str, FakeSource]:
    """All three, coarse to fine."""
    return {name: FakeSource(name, unit, guest) for name, unit in (("blocks", block), ("thp", HUGE), ("pages", FRAME))}
