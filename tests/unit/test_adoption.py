"""Entering what an earlier agent has left into a ledger: blocks on record, and what holders say that they have."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import pytest

from balloon_agent.agent.adoption import adopt
from balloon_agent.frames import FRAME
from balloon_agent.memory.holder_client import HolderClient
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.memory.sources.blocks import BlockSource
from balloon_agent.memory.sources.held import HeldSource
from balloon_agent.memory.sources.source import Source
from balloon_agent.memory.worker import Worker
from balloon_agent.takeover.state import StateFile

Description = dict[str, Any]


def described(name: str, first: int, **others: object) -> Description:
    return {"name": name, "source": "pages", "pin": 7, "pieces": [[0, first, 4]], **others}


class FoundHolder:
    """One that was found; it can be asked nothing any more once it was killed."""

    def __init__(self, name: str, extents: list[Description]) -> None:
        self.name = name
        self.extents = extents

    def request(self, message: dict[str, Any], **_: object) -> dict[str, Any]:
        assert message["op"] == "give_back"
        return {"ok": True, "failed": {}}


class FoundHolders(dict[str, FoundHolder]):
    def __init__(self, *found: FoundHolder) -> None:
        super().__init__({each.name: each for each in found})
        self.killed: list[str] = []
        self.unended_workers: set[str] = set()

    def kill(self, name: str) -> None:
        self.killed.append(name)


class Left:
    """Blocks of 128 MiB with these states, all of them on record; adopting enters what is left into a ledger."""

    def __init__(self, folder: Path, states: dict[int, str]) -> None:
        self.root = folder / "memory"
        self.root.mkdir()
        (self.root / "block_size_bytes").write_text("8000000")
        for number, state in states.items():
            (self.root / f"memory{number}").mkdir()
            (self.root / f"memory{number}/state").write_text(state)
        self.state = StateFile(folder / "state.json")
        self.state.record_blocks(dict.fromkeys(states, "Normal"))
        self.ledger = Ledger()

    def adopt(self, *found: FoundHolder, unended: Collection[str] = ()) -> FoundHolders:
        holders = FoundHolders(*found)
        holders.unended_workers.update(unended)
        state, real = self.state, cast("Holders", holders)
        whole = BlockSource(Worker(real), set, lambda _: None, state.forget_blocks, lambda: 0, str(self.root))
        pages = HeldSource("pages", FRAME, real, self.ledger, 1 << 30)
        sources: list[Source] = [whole, pages]
        adopt(sources, cast("list[HolderClient]", list(found)), real, self.ledger, state, str(self.root))
        return holders


def test_blocks_that_are_offline_are_held_and_others_only_if_they_may_become_so(tmp_path: Path) -> None:
    left = Left(tmp_path, {7: "offline", 8: "online", 9: "going-offline"})
    left.adopt()
    assert [extent.name for extent in left.ledger] == ["block-7"]
    assert left.state.blocks == {7: "Normal", 9: "Normal"}


def test_blocks_that_a_worker_may_change_yet_are_on_record_and_not_in_the_ledger(tmp_path: Path) -> None:
    """It was told to bring them online, perhaps, and the kernel is at it."""
    left = Left(tmp_path, {7: "offline", 8: "online"})
    left.adopt(unended=["worker-7"])
    assert not left.ledger
    assert left.state.blocks == {7: "Normal"}


@pytest.mark.parametrize(
    "nonsense",
    [
        described("b", 100, source="cheese"),
        described("b", 100, source="blocks"),
        described("a", 100),
        described("b", 2),
        described("b", 7 * 32768 + 5),
        described("b", 100, pieces=None),
        {"name": "b"},
    ],
    ids=["unknown source", "no holder's", "twice", "overlapping", "in an offline block", "no pieces", "half"],
)
def test_a_holder_that_says_what_cannot_be_is_ended_and_the_others_stay(
    tmp_path: Path, nonsense: Description, caplog: pytest.LogCaptureFixture
) -> None:
    """Its memory is the guest's then. Refusing to start would leave all of it held for ever."""
    left = Left(tmp_path, {7: "offline"})
    good = FoundHolder("good", [described("good-1", 1000)])
    # The last is entered first.
    liar = FoundHolder("liar", [nonsense, described("a", 0)])
    with caplog.at_level(logging.ERROR):
        holders = left.adopt(liar, good)
    assert holders.killed == ["liar"]
    assert {extent.name for extent in left.ledger} == {"block-7", "good-1"}
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "holder liar is ended, for what it holds makes no sense"
    ]
    assert not good.extents
