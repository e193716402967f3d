"""The daemon around a fake guest and the model: its own loop, turn by turn, in time that passes only when it waits."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

from balloon_agent.agent.daemon import Daemon
from balloon_agent.agent.host_target import HostTarget
from balloon_agent.agent.recovery import LONGEST_PAUSE, Recovery
from balloon_agent.api.snapshot import Snapshot
from balloon_agent.balloon.wire import StatisticTag
from balloon_agent.errors import DeviceFailed, DeviceNotFound
from balloon_agent.frames import FRAME
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.sources.source import Source
from balloon_agent.sizing import coarsening
from balloon_agent.sizing.pressure import Demand, Need
from balloon_agent.sizing.relief import Relief
from balloon_agent.takeover.release import release

from .model import BalloonModel
from .world import STATISTICS, World

SNAPSHOT = Snapshot("0", 1, "0000:00:05.0", "none", "", 0, 0)
# More turns than anything here can need to come to rest; far fewer than a loop would make.
MOST_TURNS = 400


class FakeHolders:
    """Holders of which one may have died: its pidfd is readable then."""

    pid = 1

    def __init__(self) -> None:
        self.pidfd = os.eventfd(1, os.EFD_CLOEXEC)
        self.dead: list[str] = []
        self.name = ""

    def __iter__(self) -> Iterator[FakeHolders]:
        if self.dead:
            self.name = self.dead[0]
            yield self

    def kill(self, name: str) -> None:
        self.dead.remove(name)


class FakeDemand:
    """A descriptor that becomes readable when it is said so."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.consumed = 0

    @property
    def fds(self) -> list[int]:
        return [self.fd]

    def tell(self) -> None:
        os.eventfd_write(self.fd, 1)

    def consume(self) -> bool:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        self.consumed += 1
        return True

    def drop(self, fds: Collection[int]) -> None:
        raise AssertionError(f"{fds} work")

    def close(self) -> None:
        os.close(self.fd)


class FakeStatistics:
    """The same every time; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def read(self) -> Mapping[StatisticTag, int]:
        self.asked += 1
        return STATISTICS


class Slot:
    """Where a device can be unplugged, and another one plugged in."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.plugged: BalloonModel | None = None

    def close(self) -> None:
        os.close(self._news)

    def plug(self, model: BalloonModel | None) -> None:
        """A device, or something else that is none of ours."""
        self.plugged = model
        os.eventfd_write(self._news, 1)

    def fileno(self) -> int:
        return self._news

    def drain(self) -> bool:
        os.eventfd_read(self._news)
        return True

    def part(self) -> bool:
        device = self._world.device
        with suppress(DeviceFailed):
            device.stop()
        if device.quiet:
            device.detach()
            release(cast("list[Source]", list(self._world.sources.values())), self._world.balloon, device, for_good=False)
        return device.quiet

    def find(self) -> str:
        if self.plugged is None:
            raise DeviceNotFound("no virtio balloon here")
        self._world.device.attach(self.plugged)
        return "0000:00:09.0"


class Agent:
    """A daemon over a world. ``close`` it: it has descriptors."""

    address, driver = SNAPSHOT.device, SNAPSHOT.driver
    request_fd: int | None = None

    def __init__(
        self,
        world: World,
        reserve: int = 0,
        demand: Demand | None = None,
        stalls_fd: int | None = None,
        samples: bool = False,
        slot: Slot | None = None,
        **options: Any,
    ) -> None:
        self.world = world
        self.model = world.model
        self.interrupt_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._listen()
        self.holders = FakeHolders()
        self.statistics = FakeStatistics()
        self.deaths = 0
        ram = len(world.guest.free) * FRAME
        self.recovery = Recovery(world.device, world.balloon, self.model.clock, slot)
        self.daemon = Daemon(
            world.device,
            self,
            world.balloon,
            cast("Holders", self.holders),
            self.recovery,
            cast("GuestStatistics", self.statistics),
            ram,
            HostTarget(ram, lambda: ram),
            SNAPSHOT,
            self.model.clock,
            plugging=slot,
            need=Need(
                Relief(reserve),
                world.guest.spare,
                demand,
                stalls_fd,
                samples=samples,
                is_deaf=lambda: world.guest.reclaim_is_hopeless,
            ),
            **options,
        )

    def close(self) -> None:
        self.daemon.inbox.close()
        for fd in (self.interrupt_fd, self.holders.pidfd):
            os.close(fd)

    def _listen(self) -> None:
        self.model.on_interrupt = lambda: os.eventfd_write(self.interrupt_fd, 1)

    def follow(self, model: BalloonModel) -> None:
        """This is the device from here on."""
        self.model = self.world.model = model
        self._listen()

    def start(self) -> None:
        self.world.device.start()
        for _ in self.world.balloon.announce():
            pass
        self.world.device.configuration_changed = True

    def serve_interrupt(self) -> bool:
        with suppress(BlockingIOError):
            os.eventfd_read(self.interrupt_fd)
        # As a uio device does whose function is gone: it wakes up who waits, and fails.
        self.model.check_present()
        return self.model.interrupts() is not None

    @property
    def state(self) -> Snapshot:
        return self.daemon.board.latest

    def turn(self, pause: float | None = 0.0) -> float | None:
        """One turn of the daemon's loop, after the pause that it asked for."""
        self.model.clock.now += pause or 0.0
        pause = self.daemon.turn(0.0)
        longest = coarsening.LONGEST_PAUSE if self.state.state == "resting" else LONGEST_PAUSE
        assert pause is None or 0 <= pause <= longest
        self.world.check()
        return pause

    def rest(self) -> None:
        """Until it waits for nothing but events, or for the time to look for better memory than it has."""
        pause: float | None = 0.0
        for _ in range(MOST_TURNS):
            pause = self.turn(pause)
            if pause is None or (self.state.state == "resting" and pause >= coarsening.FIRST_PAUSE):
                return
        raise AssertionError(f"no rest after {MOST_TURNS} turns: {self.state}")

    def kill_holder(self, *, heard: bool) -> None:
        """What is settled is the guest's at once; what is in flight the agent guards."""
        holder = self.world.sources["thp"].holder
        for extent in self.world.ledger.of_holder(holder):
            self.world.sources[extent.source].lose(extent)
        self.deaths += 1
        for source in self.world.sources.values():
            source.holder = f"h{self.deaths}"
        if heard:
            self.holders.dead.append(holder)
