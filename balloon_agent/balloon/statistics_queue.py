"""The statistics queue, spec 5.5.6.3: the host has one buffer of statistics, and gives it back when it wants new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from balloon_agent.virtio.queue import Buffer, DevicePage, SplitQueue

from .wire import StatisticTag, pack_statistics


class StatisticsQueue:
    """The queue of a device, from start to reset. ``notify`` tells of a buffer; ``tags`` were given before, if any."""

    def __init__(
        self, queue: SplitQueue, page: DevicePage, notify: Callable[[SplitQueue], None], tags: list[StatisticTag] | None
    ) -> None:
        self._queue = queue
        self._page = page
        self._notify = notify
        self.tags = tags

    @property
    def wanted(self) -> bool:
        """The host has none to look at: it never had, or has used the last ones."""
        self._queue.completed()
        return self._queue.outstanding == 0

    def give(self, statistics: Mapping[StatisticTag, int]) -> None:
        """Give the host statistics, the same set each time (spec 5.5.6.3.1): ValueError for another one."""
        tags = list(statistics)
        if self.tags is None:
            self.tags = tags
        if tags != self.tags:
            raise ValueError(f"the statistics are {tags} now, and were {self.tags} before")
        data = pack_statistics(statistics)
        self._page.view[: len(data)] = data
        self._queue.add([Buffer(self._page.address, len(data))])
        self._notify(self._queue)
