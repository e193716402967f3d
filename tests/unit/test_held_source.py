"""When room is made for huge pages, and when that is left alone."""

from __future__ import annotations

from typing import Any, cast

import pytest

from balloon_agent.errors import Shortage
from balloon_agent.memory.frames import HUGE
from balloon_agent.memory.held_source import USELESS_ROOM_REST, HeldSource
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger import Ledger


class FragmentedHolders:
    """One holder, which finds no huge page."""

    name = "h"
    holds_memory = True

    def __iter__(self) -> Any:
        return iter([self])

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        assert message["op"] == "take"
        return {"ok": False, "error": "memory is fragmented"}


def test_no_more_blocks_are_emptied_for_huge_pages_that_do_not_come_of_it() -> None:
    made: list[float] = []
    clock = [0.0]

    def make_room() -> bool:
        made.append(clock[0])
        return True

    holders = cast("Holders", FragmentedHolders())
    source = HeldSource("thp", HUGE, holders, Ledger(), 1 << 30, make_room, lambda: clock[0])
    for clock[0] in (1.0, 3.0, 5.0, USELESS_ROOM_REST, USELESS_ROOM_REST + 2):
        with pytest.raises(Shortage, match="fragmented"):
            source.take(HUGE)
    assert made == [1.0, USELESS_ROOM_REST + 2]
