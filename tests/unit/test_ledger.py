"""The ledger against a model of itself: a set of frames."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from balloon_agent.memory.frames import FRAME, Run, from_frames
from balloon_agent.memory.ledger import Extent, Ledger, runs_of

SOURCES = ("blocks", "thp", "pages")
FINEST_FIRST = ("pages", "thp", "blocks")


class LedgerMachine(RuleBasedStateMachine):
    """Adds and removes at random, and compares with plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model: dict[str, tuple[str, frozenset[int]]] = {}
        self.next = 0

    @rule(source=st.sampled_from(SOURCES), frames=st.frozensets(st.integers(0, 60), min_size=1, max_size=12))
    def add(self, source: str, frames: frozenset[int]) -> None:
        name = f"e{self.next}"
        self.next += 1
        extent = Extent(name, source, tuple(from_frames(frames)))
        taken = {frame for _, held in self.model.values() for frame in held}
        if frames & taken:
            with pytest.raises(ValueError, match="held already"):
                self.ledger.add(extent)
        else:
            self.ledger.add(extent)
            self.model[name] = (source, frames)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            name = data.draw(st.sampled_from(sorted(self.model)))
            self.ledger.remove(name)
            del self.model[name]

    @rule(size=st.integers(0, 80).map(lambda frames: frames * FRAME))
    def choose(self, size: int) -> None:
        chosen = self.ledger.choose(size, FINEST_FIRST)
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
        if not size:
            assert not chosen

    @invariant()
    def holds_exactly_the_models_frames(self) -> None:
        held = [frame for run in runs_of(self.ledger) for frame in range(run.first, run.end)]
        assert held == sorted(frame for _, frames in self.model.values() for frame in frames)
        assert self.ledger.size == len(held) * FRAME
        for source in SOURCES:
            expected = sum(len(frames) for kind, frames in self.model.values() if kind == source) * FRAME
            assert self.ledger.by_source().get(source, 0) == expected


TestLedger = LedgerMachine.TestCase


def test_finer_memory_is_given_back_first() -> None:
    ledger = Ledger()
    ledger.add(Extent("block-1", "blocks", (Run(0, 100),)))
    ledger.add(Extent("a", "thp", (Run(200, 10),)))
    ledger.add(Extent("b", "pages", (Run(300, 3),)))
    assert [extent.name for extent in ledger.choose(13 * FRAME, FINEST_FIRST)] == ["b", "a"]
    assert [extent.name for extent in ledger.choose(113 * FRAME, FINEST_FIRST)] == ["b", "a", "block-1"]


def test_a_name_is_entered_once() -> None:
    ledger = Ledger()
    ledger.add(Extent("a", "thp", (Run(0, 1),)))
    with pytest.raises(ValueError, match="already"):
        ledger.add(Extent("a", "thp", (Run(5, 1),)))
    assert ledger.size == FRAME
