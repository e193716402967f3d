"""The ledger against a model of itself: sets of frames."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balloon_agent.frames import FRAME, Run, from_frames
from balloon_agent.memory.ledger.frame_index import CHUNK
from balloon_agent.memory.ledger.ledger import Extent, Ledger, runs_of
from balloon_agent.memory.ledger.packed_runs import Runs

SOURCES = ("blocks", "thp", "pages")
FINEST_FIRST = ("pages", "thp", "blocks")
HOLDERS = ("h1", "h2", None)

some_runs = st.lists(st.builds(Run, st.integers(0, 60), st.integers(1, 8)), min_size=1, max_size=6)


class LedgerMachine(RuleBasedStateMachine):
    """Adds and removes at random, and compares with plain sets. The places of the model are so many ``frames`` each.

    Memory begins where it does so that a chunk of the ledger's index ends in its midst.
    """

    frames = 1
    start = 3 * CHUNK - 30

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        # In the order they were added: so is the dictionary.
        self.model: dict[str, tuple[Extent, frozenset[int]]] = {}
        self.next = 0

    def in_memory(self, run: Run) -> Run:
        return Run(self.start + run.first * self.frames, run.count * self.frames)

    @rule(
        source=st.sampled_from(SOURCES),
        holder=st.sampled_from(HOLDERS),
        frames=st.frozensets(st.integers(0, 60), min_size=1, max_size=12),
    )
    def add(self, source: str, holder: str | None, frames: frozenset[int]) -> None:
        self.add_runs(source, holder, from_frames(frames))

    @rule(source=st.sampled_from(SOURCES), holder=st.sampled_from(HOLDERS), runs=some_runs)
    def add_in_any_order(self, source: str, holder: str | None, runs: list[Run]) -> None:
        self.add_runs(source, holder, runs)

    def add_runs(self, source: str, holder: str | None, runs: list[Run]) -> None:
        frames = [frame for run in runs for frame in range(run.first, run.end)]
        name = f"e{self.next}"
        self.next += 1
        extent = Extent(name, source, tuple(map(self.in_memory, runs)), holder)
        taken = {frame for _, held in self.model.values() for frame in held}
        if len(set(frames)) < len(frames) or not taken.isdisjoint(frames):
            with pytest.raises(ValueError, match="held already"):
                self.ledger.add(extent)
        else:
            self.ledger.add(extent)
            self.model[name] = (extent, frozenset(frames))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            name = data.draw(st.sampled_from(sorted(self.model)))
            assert self.ledger.remove(name) is self.model.pop(name)[0]
            with pytest.raises(KeyError):
                self.ledger.remove(name)

    @rule(runs=some_runs)
    def look_up(self, runs: list[Run]) -> None:
        frames = {frame for run in runs for frame in range(run.first, run.end)}
        expected = {name for name, (_, held) in self.model.items() if held & frames}
        places = [self.in_memory(run) for run in runs]
        found = [extent.name for extent in self.ledger.overlapping(places)]
        assert len(found) == len(expected)
        assert set(found) == expected

    @rule(size=st.integers(0, 80))
    def choose(self, size: int) -> None:
        size *= FRAME * self.frames
        chosen = self.ledger.choose(size, FINEST_FIRST)
        assert chosen == list(self.ledger.candidates(size, FINEST_FIRST))
        assert len({extent.name for extent in chosen}) == len(chosen)
        together = sum(extent.size for extent in chosen)
        if len(chosen) > 1:
            assert together <= size
        if size and self.model:
            assert chosen
        if chosen and together > size:
            # Only where nothing fits, and then the smallest of the finest source there is.
            assert all(extent.size > size for extent in self.ledger)
            finest = next(source for source in FINEST_FIRST if any(extent.source == source for extent in self.ledger))
            assert chosen[0].source == finest
            assert chosen[0].size == min(extent.size for extent in self.ledger if extent.source == finest)
        else:
            assert chosen == self.largest_that_fit(size)
        if not size:
            assert not chosen

    def largest_that_fit(self, left: int) -> list[Extent]:
        chosen = []
        for source in FINEST_FIRST:
            latest_first = [extent for extent, _ in reversed(self.model.values()) if extent.source == source]
            for extent in sorted(latest_first, key=lambda extent: -extent.size):
                if extent.size <= left:
                    chosen.append(extent)
                    left -= extent.size
        return chosen

    @invariant()
    def holds_exactly_the_models_frames(self) -> None:
        held = [frame for run in runs_of(self.ledger) for frame in range(run.first, run.end, self.frames)]
        frames = sorted(frame for _, frames in self.model.values() for frame in frames)
        assert held == [self.start + frame * self.frames for frame in frames]
        assert self.ledger.size == len(held) * FRAME * self.frames
        assert list(self.ledger) == [extent for extent, _ in self.model.values()]
        assert len(self.ledger) == len(self.model)
        sizes = {source: sum(e.size for e, _ in self.model.values() if e.source == source) for source in SOURCES}
        assert self.ledger.by_source() == {source: size for source, size in sizes.items() if size}
        for holder in ("h1", "h2"):
            owned = [extent for extent, _ in self.model.values() if extent.holder == holder]
            assert self.ledger.of_holder(holder) == owned
            assert self.ledger.held_by(holder) == sum(extent.size for extent in owned)


class CoarseLedgerMachine(LedgerMachine):
    """The same with runs that reach over several chunks of the index, and end anywhere in them."""

    frames = CHUNK * 2 // 3
    start = 5


TestLedger = LedgerMachine.TestCase
TestCoarseLedger = CoarseLedgerMachine.TestCase


def test_finer_memory_is_given_back_first() -> None:
    ledger = Ledger()
    ledger.add(Extent("block-1", "blocks", (Run(0, 100),)))
    ledger.add(Extent("a", "thp", (Run(200, 10),)))
    ledger.add(Extent("b", "pages", (Run(300, 3),)))
    assert [extent.name for extent in ledger.choose(13 * FRAME, FINEST_FIRST)] == ["b", "a"]
    assert [extent.name for extent in ledger.choose(113 * FRAME, FINEST_FIRST)] == ["b", "a", "block-1"]


def test_a_source_that_nobody_has_ranked_is_given_back_last() -> None:
    ledger = Ledger()
    ledger.add(Extent("x", "unheard-of", (Run(0, 1),)))
    ledger.add(Extent("a", "thp", (Run(200, 10),)))
    assert [extent.name for extent in ledger.choose(11 * FRAME, FINEST_FIRST)] == ["a", "x"]


def test_few_large_extents_are_given_back_rather_than_many_small_ones_and_the_latest_of_equal_ones() -> None:
    ledger = Ledger()
    for number, count in enumerate((4, 8, 1, 8, 2, 4)):
        ledger.add(Extent(f"{number}", "thp", (Run(100 * number, count),)))
    assert [extent.name for extent in ledger.choose(15 * FRAME, FINEST_FIRST)] == ["3", "5", "4", "2"]
    ledger.remove("3")
    assert [extent.name for extent in ledger.choose(15 * FRAME, FINEST_FIRST)] == ["1", "5", "4", "2"]


def test_a_name_is_entered_once() -> None:
    ledger = Ledger()
    ledger.add(Extent("a", "thp", (Run(0, 1),)))
    with pytest.raises(ValueError, match="already"):
        ledger.add(Extent("a", "thp", (Run(5, 1),)))
    assert ledger.size == FRAME


def test_an_extent_of_many_frames_that_is_refused_leaves_nothing_behind() -> None:
    ledger = Ledger()
    ledger.add(Extent("a", "thp", (Run(10 * CHUNK, 1),)))
    with pytest.raises(ValueError, match=r"extent b: frames 0x28000\.\.0x2bfff, or some of them, are held already"):
        ledger.add(Extent("b", "blocks", (Run(CHUNK // 2, CHUNK), Run(8 * CHUNK + 5, 5 * CHUNK))))
    assert not ledger.overlapping([Run(0, 10 * CHUNK)])
    assert [extent.name for extent in ledger.overlapping([Run(0, 20 * CHUNK)])] == ["a"]


def test_runs_are_kept_packed_and_look_like_any_sequence_of_runs() -> None:
    given = (Run(7, 1), Run(1 << 40, 3), Run(2, 5))
    extent = Extent("a", "thp", given)
    assert isinstance(extent.runs, Runs)
    assert extent.runs == given == tuple(extent.runs)
    assert extent.runs == list(given)
    assert extent.runs != given[:2]
    assert extent.runs != 7
    assert hash(extent.runs) == hash(given)
    assert extent == Extent("a", "thp", Runs(given))
    assert len(extent.runs) == 3
    assert extent.size == 9 * FRAME
    assert all(isinstance(run, Run) for run in extent.runs)
    assert [extent.runs[index] for index in (0, 2, -2)] == [given[0], given[2], given[1]]
    assert extent.runs[1:] == given[1:]
    assert extent.runs[::-1] == given[::-1]
    assert Run(2, 5) in extent.runs
    with pytest.raises(IndexError):
        extent.runs[3]
    assert repr(Runs(given[:1])) == "Runs([Run(first=7, count=1)])"
