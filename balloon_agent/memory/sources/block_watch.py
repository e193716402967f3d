"""Memory blocks that others bring online or remove while they are in the balloon: the kernel says so at once."""

from __future__ import annotations

from balloon_agent.linux.uevents import Uevents

from .blocks import BlockSource

_PREFIX = "memory"


class BlockWatch:
    """Hears of memory blocks, from construction until ``close``, and looks at those that are ``source``'s."""

    def __init__(self, source: BlockSource) -> None:
        self._source = source
        self._events = Uevents("memory")

    def fileno(self) -> int:
        """Readable when a block has changed its state."""
        return self._events.fileno()

    def lost(self) -> list[str]:
        """Extents of the source that are the guest's again, and not by us, as far as was heard since the last call."""
        events = self._events.take()
        if events is None:
            return self._source.lost(None)
        names = (name.removeprefix(_PREFIX) for _, name in events if name.startswith(_PREFIX))
        return self._source.lost({int(number) for number in names if number.isdigit()})

    def close(self) -> None:
        self._events.close()
