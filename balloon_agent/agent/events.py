"""Events that the owner sleeps until: each source registers its descriptors with its handler."""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from typing import Protocol

# Takes the ready descriptors of its source, each with the events that poll has found.
Handler = Callable[[Mapping[int, int]], object]


class Events:
    """For one sleep. Handlers are called in the order in which they were registered."""

    def __init__(self) -> None:
        self._poller = select.poll()
        self._sources: list[tuple[Mapping[int, int], Handler]] = []

    def expect(self, source: Mapping[int, int], handler: Handler) -> None:
        """Call ``handler`` if one of these descriptors, each with the events to poll for, is ready."""
        for fd, events in source.items():
            self._poller.register(fd, events)
        self._sources.append((source, handler))

    def expect_input(self, fd: int, handler: Callable[[], object]) -> None:
        """Call ``handler`` if this one is readable, or has failed."""
        self.expect({fd: select.POLLIN}, lambda _: handler())

    def wait(self, pause: float | None) -> None:
        """Sleep until something happens, at most ``pause`` seconds (for ever if None), and have it handled."""
        ready = dict(self._poller.poll(None if pause is None else pause * 1000))
        for source, handler in self._sources:
            if found := {fd: ready[fd] for fd in source if fd in ready}:
                handler(found)


class Line(Protocol):
    """How the device makes itself heard; another device after it, too."""

    @property
    def interrupt_fd(self) -> int | None:
        """Readable when there is something to serve. None while there is no device."""
        ...

    @property
    def request_fd(self) -> int | None:
        """Readable when the kernel wants the device back; None where it does not ask."""
        ...

    @property
    def address(self) -> str: ...

    @property
    def driver(self) -> str: ...

    def serve_interrupt(self) -> bool:
        """Take the interrupt in; true if there was any. DeviceFailed if the device is not ours any more."""
        ...


class Plugging(Protocol):
    """Tells of devices that come and go, or change hands."""

    def fileno(self) -> int: ...

    def drain(self) -> bool:
        """True if anything of interest has come since the last call."""
        ...


class Blocks(Protocol):
    """Tells of memory blocks that others bring online, or remove, while they are in the balloon."""

    def fileno(self) -> int: ...

    def lost(self) -> list[str]:
        """The extents that are the guest's again, as far as was heard since the last call."""
        ...
