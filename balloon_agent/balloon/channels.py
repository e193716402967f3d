"""The three ways to tell a host about memory, behind one interface.

- ``cont``: runs on the two cont queues of the proposal (CONT_PAGES).
- ``reporting``: runs as device-writable buffers on the reporting queue (spec 5.5.6.7). The host discards each at once, and need
  not hear when it is used again: unpatched QEMU from 5.1 on does so with free-page-reporting=on.
- ``classic``: frames one by one on the inflate and deflate queues (spec 5.5.6), as every host understands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from balloon_agent.errors import FeatureMissing
from balloon_agent.frames import FRAME, Run
from balloon_agent.virtio.queue import Buffer, DevicePage, SplitQueue

from .wire import (
    CONT_ENTRY_SIZE,
    FRAME_NUMBER_SIZE,
    BalloonFeature,
    frame_arrays,
    in_batches,
    pack_runs,
)

# From the one that tells most at once to the one that always works; also their names on the command line.
FEATURES = {
    "cont": BalloonFeature.CONT_PAGES,
    "reporting": BalloonFeature.REPORTING,
    "classic": BalloonFeature(0),
}
CHANNEL_NAMES = tuple(FEATURES)
# The first of these that the device offers.
AUTO = "auto"
# Firecracker never completes a buffer with more frames, and Linux never sends one.
FRAMES_PER_BUFFER = 256
# For hosts whose memory lies in huge pages: QEMU discards one only if a single buffer names all of it.
FRAMES_PER_HUGE_BUFFER = 512
# As many ranges as Linux puts into one report (PAGE_REPORTING_CAPACITY), and QEMU's queue has room for.
RANGES_PER_REPORT = 32
# Pages for frame numbers: how much memory a single notification can be about. It stalls the vCPU meanwhile.
CLASSIC_PAGES = 4
# No limit by bytes: runs are counted, not frames.
ANY_SIZE = 1 << 62

# Makes chains of buffers available on a queue, and returns when the device has used them all; DeviceFailed if it does not.
Post = Callable[[SplitQueue, Sequence[Sequence[Buffer]]], None]


def choose_channel(wanted: str, offered: BalloonFeature, *, reports: bool) -> str:
    """The name of the channel to use: the best one if AUTO is ``wanted``. FeatureMissing if the device does not offer it.

    ``reports`` says that the device reaches the memory of a report: that is an address to it, and no number.
    """
    for name, feature in FEATURES.items():
        if name == "reporting" and not reports:
            continue
        if wanted in (AUTO, name) and offered & feature == feature:
            return name
    if wanted == "reporting" and not reports:
        raise FeatureMissing(
            "--channel reporting is not possible behind an IOMMU (ACCESS_PLATFORM), where the device reaches no balloon "
            "memory: let the agent choose with --channel auto, or the host leave iommu_platform off"
        )
    feature = FEATURES[wanted]
    raise FeatureMissing(
        f"the device does not offer {feature.name} (feature bit {feature.bit_length() - 1}, it offers "
        f"{int(offered):#x}), which --channel {wanted} needs: "
        "switch it on at the host, or let the agent choose with --channel auto"
    )


class Channel(Protocol):
    """How the host is told. Both calls return after its acknowledgement, or raise DeviceFailed.

    ``at_once`` is how many bytes a single notification names at most, if they lie in few runs.
    """

    @property
    def at_once(self) -> int: ...

    def inflate(self, runs: Sequence[Run]) -> None: ...

    def deflate(self, runs: Sequence[Run]) -> None: ...


class ContChannel:
    """Arrays of (frame, bytes) on the cont queues."""

    at_once = ANY_SIZE

    def __init__(self, post: Post, inflate: SplitQueue, deflate: SplitQueue, page: DevicePage) -> None:
        self._post = post
        self._inflate_queue = inflate
        self._deflate_queue = deflate
        self._page = page

    def inflate(self, runs: Sequence[Run]) -> None:
        self._send(self._inflate_queue, runs)

    def deflate(self, runs: Sequence[Run]) -> None:
        self._send(self._deflate_queue, runs)

    def _send(self, queue: SplitQueue, runs: Sequence[Run]) -> None:
        for batch in in_batches(runs, FRAME // CONT_ENTRY_SIZE):
            data = pack_runs(batch)
            self._page.view[: len(data)] = data
            self._post(queue, [[Buffer(self._page.address, len(data))]])


class ReportingChannel:
    """Ranges on the reporting queue: each is the buffer. Nothing is posted to have one back."""

    at_once = ANY_SIZE

    def __init__(self, post: Post, reporting: SplitQueue) -> None:
        self._post = post
        self._queue = reporting

    def inflate(self, runs: Sequence[Run]) -> None:
        for batch in in_batches(runs, min(self._queue.size, RANGES_PER_REPORT)):
            self._post(self._queue, [[Buffer(run.first * FRAME, run.size, device_writes=True) for run in batch]])

    def deflate(self, runs: Sequence[Run]) -> None:
        """The host has acknowledged the report: from then on its pages are the guest's whenever it likes (spec 5.5.6.7)."""


class ClassicChannel:
    """Arrays of single frames on the inflate and deflate queues, at most ``frames_per_buffer`` in each."""

    def __init__(
        self, post: Post, inflate: SplitQueue, deflate: SplitQueue, pages: Sequence[DevicePage], frames_per_buffer: int
    ) -> None:
        self._post = post
        self._inflate_queue = inflate
        self._deflate_queue = deflate
        self._most = frames_per_buffer
        size = frames_per_buffer * FRAME_NUMBER_SIZE
        self._slots = [
            (page.address + offset, page.view[offset : offset + size])
            for page in pages
            for offset in range(0, FRAME - size + 1, size)
        ]

    @property
    def at_once(self) -> int:
        return min(len(self._slots), self._inflate_queue.size) * self._most * FRAME

    def inflate(self, runs: Sequence[Run]) -> None:
        self._send(self._inflate_queue, runs)

    def deflate(self, runs: Sequence[Run]) -> None:
        self._send(self._deflate_queue, runs)

    def _send(self, queue: SplitQueue, runs: Sequence[Run]) -> None:
        # Several buffers in one notification: that is a trap into the host, and costs more than what it is about.
        for arrays in in_batches(frame_arrays(runs, self._most), min(len(self._slots), queue.size)):
            chains = []
            for (address, view), data in zip(self._slots, arrays, strict=False):
                view[: len(data)] = data
                chains.append([Buffer(address, len(data))])
            self._post(queue, chains)
