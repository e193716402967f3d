"""The balloon device as the rest of the agent sees it: inflate(runs), deflate(runs), give_stats(), target, actual."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from balloon_agent.errors import (
    BadInput,
    DeviceFailed,
    DeviceGone,
    DeviceTimeout,
    FeatureMissing,
)
from balloon_agent.frames import FRAME, Run
from balloon_agent.virtio.device import InterruptingTransport, VirtioDevice
from balloon_agent.virtio.queue import Buffer, SplitQueue
from balloon_agent.virtio.spec import LARGEST_QUEUE, InterruptStatus, TransportFeature

from .channels import (
    AUTO,
    CHANNEL_NAMES,
    CLASSIC_PAGES,
    FEATURES,
    FRAMES_PER_BUFFER,
    FRAMES_PER_HUGE_BUFFER,
    Channel,
    ClassicChannel,
    ContChannel,
    ReportingChannel,
    choose_channel,
)
from .queues import QueueNumbers, queue_numbers
from .statistics_queue import StatisticsQueue
from .tally import Tally
from .wire import (
    BalloonConfiguration,
    BalloonFeature,
    StatisticTag,
)

# How long a host may take over one notification. A synchronous host is done before the notification returns.
ANSWER_DEADLINE = 30.0
# An asynchronous one is looked at so often without an interrupt, so that one that got lost costs time and nothing else.
LOOK_INTERVAL = 1.0
# The queues that a channel posts on, up and down, as the metrics call them. A report needs no way back.
_QUEUE_NAMES: dict[str, tuple[str, str | None]] = {
    "cont": ("inflate_cont", "deflate_cont"),
    "reporting": ("reporting", None),
    "classic": ("inflate", "deflate"),
}
# What a balloon can offer: the bits of its own type.
_BALLOON_BITS = (1 << 24) - 1


class BalloonDevice:
    """One device, from reset to reset, as often as need be. ``start`` before anything else, ``stop`` at the end.

    ``channel`` is how the host is told of memory, or ``auto`` for the best way that it offers. ``frames_per_buffer`` is for the
    classic one. After DeviceFailed nothing but ``stop`` and ``start`` makes sense. ``alive`` is called before each wait.
    """

    def __init__(
        self,
        transport: InterruptingTransport,
        channel: str = AUTO,
        frames_per_buffer: int = FRAMES_PER_BUFFER,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        if channel not in (AUTO, *CHANNEL_NAMES):
            raise BadInput(f"unknown channel {channel}: known are {AUTO}, {', '.join(CHANNEL_NAMES)}")
        if frames_per_buffer not in (FRAMES_PER_BUFFER, FRAMES_PER_HUGE_BUFFER):
            raise BadInput(f"{frames_per_buffer} frames per buffer: {FRAMES_PER_BUFFER} or {FRAMES_PER_HUGE_BUFFER}")
        self._transport = transport
        self._attached = True
        self._wanted_channel = channel
        self._frames_per_buffer = frames_per_buffer
        self._clock = clock
        self._sleep = sleep
        self._alive = alive
        self.virtio = VirtioDevice(transport, clock, sleep)
        self.offered = BalloonFeature(0)
        self.configuration_changed = False
        # Whether it leaves memory alone: it was never started, has been reset since, or is not there any more.
        self.quiet = True
        # Whether it was denied access to memory, because it could not be reset.
        self.cut_off = False
        # The guest's OOM killer looks for a victim. Where it takes whoever asks for memory, a loss is no choice of ours.
        self.oom_killer_chooses = True
        self.channel_name = ""
        self.tally = Tally(clock)
        self._channel: Channel | None = None
        self._queues: list[SplitQueue] = []
        self._statistics: StatisticsQueue | None = None
        # Tags of the statistics that this device was given before its reset.
        self._tags: list[StatisticTag] | None = None

    def attach(self, transport: InterruptingTransport) -> None:
        """Speak to another device from here on, after ``detach``; as little is known of it as of the first one."""
        self._transport = transport
        self.virtio = VirtioDevice(transport, self._clock, self._sleep)
        self.offered = BalloonFeature(0)
        self._tags = None
        self._attached = self.quiet = True
        self.cut_off = False

    def detach(self) -> None:
        """There is no device for now: its registers are about to be closed. It must be ``quiet``, or never have had a ring."""
        assert self.quiet or not self._queues
        self.offered, self.channel_name = BalloonFeature(0), ""
        self._forget()
        self._attached = False

    @property
    def deflates_on_oom(self) -> bool:
        """Whether the host allows the balloon to be smaller than its target (DEFLATE_ON_OOM)."""
        return bool(self.virtio.negotiated & BalloonFeature.DEFLATE_ON_OOM)

    @property
    def bears_loss(self) -> bool:
        """Whether what is held may be offered to the OOM killer: the host can be told of it afterwards."""
        must_tell = self.virtio.negotiated & BalloonFeature.MUST_TELL_HOST
        return self.deflates_on_oom and not must_tell and self.oom_killer_chooses

    def start(self) -> None:
        """Reset and bring the device to life. FeatureMissing if it does not offer the channel that was asked for."""
        self._reset()
        self._transport.enable()
        self.quiet = self.cut_off = False
        try:
            self._initialise()
        except BaseException:
            # Nothing may stay half negotiated; the reset is what keeps the device off the ring pages.
            with suppress(DeviceFailed):
                self._transport.check_present()
                self.virtio.fail()
            self._reset()
            raise

    def _initialise(self) -> None:
        # What it offers before anything is negotiated decides which queue is which.
        offered = self.virtio.offered()
        self.offered = BalloonFeature(offered & _BALLOON_BITS)
        behind_iommu = bool(offered & TransportFeature.ACCESS_PLATFORM)
        if behind_iommu and self._transport.unreachable is not None:
            raise FeatureMissing(f"the device cannot be used: {self._transport.unreachable}")
        reports = not (behind_iommu and self._transport.translated)
        name = choose_channel(self._wanted_channel, self.offered, reports=reports)
        wanted = BalloonFeature.STATS_VQ | BalloonFeature.DEFLATE_ON_OOM | FEATURES[name]
        if name != "reporting":
            # A report is no part of the balloon that the host could insist on being told of before it is used.
            wanted |= BalloonFeature.MUST_TELL_HOST
        # PAGE_POISON is left out on purpose: a stale poison value can come back from the device, and then it discards nothing.
        self.virtio.negotiate(wanted, FEATURES[name])
        sizes = self.virtio.queue_sizes()
        numbers = queue_numbers(self.offered, sizes)
        # These two always: some hosts (cloud-hypervisor) do not come to life without them, whatever else is used.
        classic = [self._queue(number, sizes) for number in (numbers.inflate, numbers.deflate)]
        self._channel = self._open_channel(name, numbers, sizes, classic)
        self.channel_name = name
        for queue in filter(None, _QUEUE_NAMES[name]):
            self.tally.open(queue)
        if numbers.stats is not None:
            # The host asks whenever it likes: the only queue whose completions come unexpected.
            stats = self._queue(numbers.stats, sizes, interrupts=True)
            (page,) = self.virtio.allocate_pages(1)
            self._statistics = StatisticsQueue(stats, page, self.virtio.notify, self._tags)
        self.virtio.driver_ok()
        self.virtio.check_status()
        self.target()
        self._transport.enable_interrupt()

    def _open_channel(self, name: str, numbers: QueueNumbers, sizes: Sequence[int], classic: Sequence[SplitQueue]) -> Channel:
        if name == "reporting":
            assert numbers.reporting is not None
            return ReportingChannel(self._post, self._queue(numbers.reporting, sizes))
        if name == "cont":
            assert numbers.inflate_cont is not None
            assert numbers.deflate_cont is not None
            inflate, deflate = (self._queue(number, sizes) for number in (numbers.inflate_cont, numbers.deflate_cont))
            return ContChannel(self._post, inflate, deflate, *self.virtio.allocate_pages(1))
        inflate, deflate = classic
        return ClassicChannel(self._post, inflate, deflate, self.virtio.allocate_pages(CLASSIC_PAGES), self._frames_per_buffer)

    def _queue(self, number: int, sizes: Sequence[int], *, interrupts: bool = False) -> SplitQueue:
        """A queue; interrupts for its completions are otherwise asked for only while one is waited for: see ``_wait``."""
        queue = self.virtio.set_up_queue(number, min(sizes[number], LARGEST_QUEUE), interrupts=interrupts)
        self._queues.append(queue)
        return queue

    def stop(self) -> None:
        """Reset: after this the device touches neither rings nor buffers. DeviceFailed if it was only cut off from them."""
        self._reset()

    def _reset(self) -> None:
        if not self._attached:
            raise DeviceGone("there is no device for now")
        self.quiet = False
        try:
            self._transport.check_present()
        except DeviceGone:
            self.quiet = True
            raise
        try:
            self.virtio.reset()
        except BaseException:
            if not self._transport.answers():
                self.quiet = True
            with suppress(DeviceFailed):
                self._transport.disable()
            self.cut_off = not self.quiet
            raise
        self.quiet = True
        self._forget()

    def _forget(self) -> None:
        for queue in self._queues:
            queue.release()
        self._queues.clear()
        self._channel = self._statistics = None
        self.configuration_changed = False

    # -- configuration -------------------------------------------------------------------------------------------

    def target(self) -> int:
        """Bytes that the host wants in the balloon. Not checked against anything: the host may ask for what it likes."""
        self._transport.check_present()
        (frames,) = self.virtio.read_configuration(BalloonConfiguration.num_pages)
        return frames * FRAME

    def set_actual(self, size: int) -> None:
        """Tell the host that the balloon holds ``size`` bytes, in one store (spec 5.5.6.1)."""
        self.virtio.write_configuration(BalloonConfiguration.actual, size // FRAME)

    def handle_interrupt(self) -> None:
        """Ask the device why it interrupted, remember it, and let the next interrupt through. DeviceFailed if it has failed."""
        self._transport.check_present()
        if self.virtio.interrupt_status() & InterruptStatus.CONFIGURATION:
            self.configuration_changed = True
            self.virtio.check_status()
        self._transport.enable_interrupt()

    # -- memory ----------------------------------------------------------------------------------------------------

    @property
    def at_once(self) -> int:
        """Bytes that one notification names at most, if they lie in few runs."""
        assert self._channel is not None, "the device was not started"
        return self._channel.at_once

    def inflate(self, runs: Sequence[Run]) -> None:
        """Hand frames to the host; they are the host's once this returns, and until ``deflate`` has returned.

        The frames must be held and pinned, and must stay so even if this raises: the host may have taken any of them.
        """
        assert self._channel is not None, "the device was not started"
        self._check()
        with self.tally.posting(_QUEUE_NAMES[self.channel_name][0], sum(run.size for run in runs)):
            self._channel.inflate(runs)
        self.tally.count_runs("inflate", runs)

    def deflate(self, runs: Sequence[Run]) -> None:
        """Ask for frames back; they may be used once this returns."""
        assert self._channel is not None, "the device was not started"
        # Also where nothing is posted: a device that was reset behind our back says nothing of it.
        self._check()
        queue = _QUEUE_NAMES[self.channel_name][1]
        if queue is None:
            self._channel.deflate(runs)
            return
        with self.tally.posting(queue, sum(run.size for run in runs)):
            self._channel.deflate(runs)
        self.tally.count_runs("deflate", runs)

    def _check(self) -> None:
        """DeviceFailed unless the device is there, ours and well. Asked at each step: not everything is heard of at once."""
        self._transport.check_present()
        self.virtio.check_status()

    def _post(self, queue: SplitQueue, chains: Sequence[Sequence[Buffer]]) -> None:
        heads = {queue.add(chain) for chain in chains}
        # Each time: it can be unplugged at any, and there is nothing behind its registers then.
        self._transport.check_present()
        self.virtio.notify(queue)
        # A synchronous host, such as QEMU, is done by now: no interrupt, no wait.
        if heads := heads - {*queue.completed()}:
            self._wait(queue, heads)

    def _wait(self, queue: SplitQueue, heads: set[int]) -> None:
        # What is posted at once can be many buffers, and each of them is waited for.
        self._alive()
        # No answer at once is the rule for some hosts, and for others the first sign that something is wrong.
        self._transport.check_present()
        self.virtio.check_status()
        deadline = self._clock() + ANSWER_DEADLINE
        queue.set_interrupts(True)
        try:
            # Asked again after the interrupt was switched on: the answer may have come in between.
            while heads := heads - {*queue.completed()}:
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise DeviceTimeout(f"queue {queue.index}: no answer to {len(heads)} buffers within {ANSWER_DEADLINE:g} s")
                if self._transport.wait_interrupt(min(remaining, LOOK_INTERVAL)):
                    self.handle_interrupt()
                self._transport.check_present()
                self.virtio.check_status()
        finally:
            queue.set_interrupts(False)

    # -- statistics --------------------------------------------------------------------------------------------------

    @property
    def stats_wanted(self) -> bool:
        """The host wants statistics. It never does where it does not offer the queue for them."""
        return self._statistics is not None and self._statistics.wanted

    def give_stats(self, statistics: Mapping[StatisticTag, int]) -> None:
        """Give the host statistics, if it wants any."""
        if self._statistics is None or not self._statistics.wanted:
            return
        self._transport.check_present()
        self._statistics.give(statistics)
        self._tags = self._statistics.tags
