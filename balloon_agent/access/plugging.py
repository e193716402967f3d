"""Hearing of PCI functions that come, go, or change hands while the agent runs."""

from __future__ import annotations

from balloon_agent.linux.uevents import Uevents

# A new function may be heard of before the kernel's own driver has it, and before one of ours can: each is worth another look.
_OF_INTEREST = ("add", "bind", "unbind")


class PciPlugging:
    """Open from construction until ``close``."""

    def __init__(self) -> None:
        self._events = Uevents("pci")

    def fileno(self) -> int:
        """Readable when there is something to ``drain``."""
        return self._events.fileno()

    def drain(self) -> bool:
        """Whether a function has come, or changed hands, since the last call. Does not block."""
        events = self._events.take()
        # What was lost may have been of one.
        return events is None or any(action in _OF_INTEREST for action, _ in events)

    def close(self) -> None:
        self._events.close()
