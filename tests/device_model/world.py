"""A whole agent around the model, but for processes and files: device, balloon and guest, as one thread drives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.balloon.wire import StatisticTag
from balloon_agent.frames import FRAME
from balloon_agent.memory.ledger.ledger import Ledger, runs_of
from balloon_agent.sizing.balloon import Balloon, Step
from balloon_agent.virtio.device import InterruptingTransport

from .guest import MIB, FakeGuest, sources
from .model import BALLOON, DEFLATING, MODERN, BalloonModel
from .numbering import CONT, STATS
from .parts import Quirks

GUEST_SIZE = 64 * MIB
BLOCK_SIZE = 8 * MIB
STATISTICS: Mapping[StatisticTag, int] = {StatisticTag.FREE_MEMORY: 1 << 30, StatisticTag.TOTAL_MEMORY: 2 << 30}


class World:
    """A small guest with a balloon in it. The model hears of each frame that the guest begins to use."""

    def __init__(
        self,
        features: int = MODERN | CONT | STATS,
        channel: str = "auto",
        *,
        roles: Sequence[str | None] | None = None,
        sizes: Sequence[int] | None = None,
        quirks: Quirks | None = None,
        frames_per_buffer: int = 256,
        check_floor: bool = True,
        guest_size: int = GUEST_SIZE,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.guest = FakeGuest(guest_size, block_size)
        self.model = BalloonModel(
            features, roles, sizes, quirks, frames=guest_size // FRAME, guest=self.guest, check_floor=check_floor
        )
        self.guest.on_use = self.model.guest_uses
        self.guest.on_seize = self.model.guest_seizes
        self.sources = sources(self.guest, block_size)
        self.ledger = Ledger()
        self.channel = channel
        self.frames_per_buffer = frames_per_buffer
        self.attach(self.model)

    def attach(self, transport: InterruptingTransport) -> None:
        """A driver for the device behind ``transport``; not started."""
        clock = self.model.clock
        self.device = BalloonDevice(transport, self.channel, self.frames_per_buffer, clock, clock.sleep)
        self.balloon = Balloon(
            self.device,
            list(self.sources.values()),
            list(self.sources),
            self.ledger,
            self.guest.spare,
            0,
            self.guest.boundary,
            clock,
        )

    def start(self) -> None:
        self.device.start()
        for _ in self.balloon.announce():
            pass
        self.listen()

    def listen(self) -> None:
        """Take in what the device has to say."""
        if self.model.interrupts():
            self.device.handle_interrupt()
        if self.device.stats_wanted:
            self.device.give_stats(STATISTICS)

    def follow(self, size: int) -> Step:
        """The host asks for ``size`` bytes, and gets them."""
        self.model.ask_for(size // FRAME)
        step = Step(moved=True)
        while step.moved:
            self.listen()
            step = self.balloon.step(self.device.target())
        self.listen()
        self.model.at_rest(self.balloon.actual // FRAME)
        return step

    def check(self) -> None:
        """What must be true whatever happens: each frame in one hand, and none of the guest's in the device's."""
        held = bytearray(len(self.guest.free))
        for run in runs_of(self.ledger):
            assert not any(held[run.first : run.end]), f"frame {run.first:#x} is held twice"
            held[run.first : run.end] = b"\1" * run.count
        device = self.model.state.translate(TOUCHABLE)
        # As numbers, byte by byte: what the device may touch is held, and not the guest's.
        assert not number(device) & ~number(held), "the device may touch what the ledger does not know of"
        # But for what the guest has from a dead holder: that is the price of the OOM fuse, until the host is told. Never for
        # what is in flight, though.
        seized = number(self.guest.seized) & number(self.model.state.translate(ACKNOWLEDGED))
        assert not number(device) & number(self.guest.free) & ~seized, "the device may touch what the guest uses"
        self.guest.seized[:] = seized.to_bytes(len(device), "little")


# What a device may do anything to, of the model's states.
TOUCHABLE = bytes([0, *[1] * 255])
ACKNOWLEDGED = bytes(state in (BALLOON, DEFLATING) for state in range(256))


def number(frames: bytes | bytearray) -> int:
    return int.from_bytes(frames, "little")
