"""Giving everything back to the guest, once no device can act on it any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import (
    BalloonError,
    DeviceFailed,
    DeviceNotFound,
    HolderLost,
)
from balloon_agent.memory.sources.blocks import BlockSource
from balloon_agent.memory.sources.source import Source
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.virtio.device import InterruptingTransport

from .device_slot import Seat

_log = logging.getLogger(__name__)


def silence(device: BalloonDevice, transport: InterruptingTransport | None) -> None:
    """The device no longer acts on memory after this: reset, or else cut off. There is none any more without a transport."""
    if transport is None:
        return
    try:
        device.stop()
    finally:
        with suppress(DeviceFailed):
            transport.disable()


def release(
    sources: Sequence[Source],
    balloon: Balloon,
    device: BalloonDevice,
    stays: Callable[[], bool] = lambda: False,
    *,
    for_good: bool = True,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """The device has been reset: what is still in the balloon goes back to the guest, unless it ``stays``.

    ``alive`` is called as it goes on. ``for_good`` if this agent drives no device after this. Where it could not be reset
    nothing goes back: the next agent finds all of it held, and tries again.
    """
    ledger = balloon.ledger
    if not device.quiet:
        if len(ledger):
            _log.error("%s stay in the balloon: the device was not reset, and may act on them yet", format_size(ledger.size))
        return
    if for_good:
        balloon.drop_unposted(for_good=True)
    else:
        balloon.free_unposted()
    if stays():
        return
    by_name = {source.name: source for source in sources}
    for extent in list(ledger):
        # There can be thousands, and each can take a while.
        alive()
        try:
            problem: Exception | None = by_name[extent.source].give_back([extent]).get(extent.name)
        except (BalloonError, OSError) as error:
            problem = error
        if problem is not None and not isinstance(problem, HolderLost):
            _log.error("%s (%s) stays in the balloon: %s", extent.name, format_size(extent.size), problem)
            continue
        if problem is not None:
            _log.warning("%s: %s; its memory is the guest's", extent.name, problem)
        ledger.remove(extent.name)
    for source in sources:
        if isinstance(source, BlockSource):
            source.restore_stranded()


class News(Protocol):
    def drain(self) -> bool: ...


class Succession:
    """What is held for a device goes with it; another one may follow. ``changed`` is called when less is held.

    ``news`` tells that another device may be there.
    """

    def __init__(
        self,
        seat: Seat,
        sources: Sequence[Source],
        balloon: Balloon,
        changed: Callable[[], None],
        news: News,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._seat = seat
        self._alive = alive
        self._news = news
        self._sources = sources
        self._balloon = balloon
        self._changed = changed

    def part(self) -> bool:
        """Whether the device can act on memory no more; then it is let go, and what it was told of is the guest's."""
        if not self._seat.vacate():
            return False
        assert self._seat.device is not None
        # First: the kernel may wait for it with a lock that it takes for memory blocks, too (drivers/acpi/scan.c).
        self._seat.leave()
        release(self._sources, self._balloon, self._seat.device, for_good=False, alive=self._alive)
        self._changed()
        return True

    def find(self) -> str:
        """The address of the balloon that is in hand now. DeviceNotFound if there is none."""
        try:
            self._seat.take()
        except DeviceNotFound:
            # Nothing was touched, and what has been heard since may be of a device.
            raise
        except BaseException:
            # Taking it and giving it back was news, too: of our own making.
            self._news.drain()
            raise
        return self._seat.address
