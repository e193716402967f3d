"""The balloon device as the rest of the agent sees it: inflate(runs), deflate(runs), target, actual."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from balloon_agent.errors import DeviceMisbehaved, DeviceTimeout, FeatureMissing
from balloon_agent.memory.frames import FRAME, Run
from balloon_agent.virtio.device import Transport, VirtioDevice
from balloon_agent.virtio.queue import Buffer, SplitQueue
from balloon_agent.virtio.spec import LARGEST_QUEUE, InterruptStatus, Status

from .queues import cont_queues
from .wire import CONT_ENTRY_SIZE, BalloonConfiguration, BalloonFeature, in_buffers, pack_runs

# How long a host may take over one buffer. A synchronous host is done before the notification returns.
ANSWER_DEADLINE = 30.0
# PAGE_POISON is left out on purpose: a stale poison value can come back from the device, and then it discards nothing.
WANTED = BalloonFeature.CONT_PAGES | BalloonFeature.DEFLATE_ON_OOM | BalloonFeature.MUST_TELL_HOST


class InterruptingTransport(Transport, Protocol):
    """A transport whose interrupt can be waited for."""

    def wait_interrupt(self, timeout: float) -> bool:
        """Whether an interrupt came within ``timeout`` seconds."""
        ...

    def enable_interrupt(self) -> None: ...

    def enable(self) -> None:
        """Let the device address memory."""
        ...


class BalloonDevice:
    """One device from reset to reset. ``start`` before anything else, ``stop`` at the end, whatever happened."""

    def __init__(self, transport: InterruptingTransport, clock: Callable[[], float] = time.monotonic) -> None:
        self._transport = transport
        self._clock = clock
        self.virtio = VirtioDevice(transport, clock)
        self.offered = BalloonFeature(0)
        self.features = BalloonFeature(0)
        self.configuration_changed = False
        self._queues: list[SplitQueue] = []

    def start(self) -> None:
        """Reset and bring the device to life. FeatureMissing if it does not know runs."""
        self.virtio.reset()
        self._transport.enable()
        try:
            self.offered = BalloonFeature(self.virtio.offered() & 0x7F)
            if not self.offered & BalloonFeature.CONT_PAGES:
                raise FeatureMissing(
                    "the device does not offer CONT_PAGES (feature bit 6, it offers "
                    f"{self.offered:#x}): add cont-pages=on to it and use the patched QEMU (contrib/qemu)"
                )
            self.features = BalloonFeature(self.virtio.negotiate(WANTED, BalloonFeature.CONT_PAGES) & 0x7F)
            sizes = self.virtio.queue_sizes()
            numbers = cont_queues(self.offered, sizes)
            # Interrupts for completions are asked for only while one is waited for: see _wait.
            self._inflate = self._queue(numbers.inflate, sizes)
            self._deflate = self._queue(numbers.deflate, sizes)
            (self._entries,) = self.virtio.allocate_pages(1)
            self.virtio.driver_ok()
            self._transport.enable_interrupt()
        except BaseException:
            # Nothing may stay half negotiated; the reset is what keeps the device off the ring pages.
            self.virtio.fail()
            self.virtio.reset()
            raise

    def _queue(self, number: int, sizes: Sequence[int]) -> SplitQueue:
        queue = self.virtio.set_up_queue(number, min(sizes[number], LARGEST_QUEUE), interrupts=False)
        self._queues.append(queue)
        return queue

    def stop(self) -> None:
        """Reset: after this the device touches neither rings nor buffers."""
        self.virtio.reset()
        for queue in self._queues:
            queue.release()
        self._queues.clear()

    # -- configuration -------------------------------------------------------------------------------------------

    def target(self) -> int:
        """Bytes that the host wants in the balloon. Not checked against anything: the host may ask for what it likes."""
        (frames,) = self.virtio.read_configuration(BalloonConfiguration.num_pages)
        return frames * FRAME

    def set_actual(self, size: int) -> None:
        """Tell the host that the balloon holds ``size`` bytes, in one store (spec 5.5.6.1)."""
        self.virtio.write_configuration(BalloonConfiguration.actual, size // FRAME)

    def handle_interrupt(self) -> None:
        """Ask the device why it interrupted, remember it, and let the next interrupt through."""
        if self.virtio.interrupt_status() & InterruptStatus.CONFIGURATION:
            self.configuration_changed = True
            self.check_health()
        self._transport.enable_interrupt()

    def check_health(self) -> None:
        """DeviceMisbehaved unless the device is as ``start`` left it."""
        status = self.virtio.status()
        expected = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        if status != expected:
            why = "it needs a reset" if status & Status.NEEDS_RESET else "it was reset by somebody else"
            raise DeviceMisbehaved(f"device_status is {int(status):#x}, not {int(expected):#x}: {why}")

    # -- memory ----------------------------------------------------------------------------------------------------

    def inflate(self, runs: Sequence[Run]) -> None:
        """Hand frames to the host; they are the host's once this returns, and until ``deflate`` has returned.

        The frames must be held and pinned, and must stay so even if this raises: the host may have taken any of them.
        """
        self._post(self._inflate, runs)

    def deflate(self, runs: Sequence[Run]) -> None:
        """Ask for frames back; they may be used once this returns."""
        self._post(self._deflate, runs)

    def _post(self, queue: SplitQueue, runs: Sequence[Run]) -> None:
        for batch in in_buffers(runs, FRAME // CONT_ENTRY_SIZE):
            data = pack_runs(batch)
            self._entries.view[: len(data)] = data
            head = queue.add([Buffer(self._entries.address, len(data))])
            self.virtio.notify(queue)
            self._wait(queue, head)

    def _wait(self, queue: SplitQueue, head: int) -> None:
        if queue.completed() == [head]:
            return  # a synchronous host, such as QEMU: no interrupt, no wait
        # No answer at once is the rule for some hosts, and for others the first sign that something is wrong.
        self.check_health()
        deadline = self._clock() + ANSWER_DEADLINE
        queue.set_interrupts(True)
        try:
            # Asked again after the interrupt was switched on: the answer may have come in between.
            while not queue.completed():
                remaining = deadline - self._clock()
                if remaining <= 0:
                    raise DeviceTimeout(f"queue {queue.index}: no answer to a buffer within {ANSWER_DEADLINE:g} s")
                if self._transport.wait_interrupt(remaining):
                    self.handle_interrupt()
        finally:
            queue.set_interrupts(False)
