"""What the model is made of: shared pages, chains, queues, how it may misbehave, and a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Page(NamedTuple):
    """A shared page: where the device finds it, and the driver's view."""

    address: int
    view: memoryview


class Chain(NamedTuple):
    """A chain that the device has taken off a queue: as it was then, and what it says about frames."""

    head: int
    numbers: list[int]
    descriptors: bytes
    readable: list[tuple[int, int]]
    data: bytes
    writable: list[tuple[int, int]]
    runs: list[tuple[int, int]]


@dataclass
class Queue:
    """A virtqueue as the device keeps it. ``role`` is None for a number without a queue."""

    role: str | None
    size: int
    largest: int
    enabled: bool = False
    descriptors: int = 0
    available: int = 0
    used: int = 0
    next_available: int = 0
    next_used: int = 0
    pending: list[Chain] = field(default_factory=list)
    written: bytes = b""


@dataclass
class Quirks:
    """How this device differs from a plain one."""

    late: bool = False  # completions come only while the driver waits
    backwards: bool = False  # of what is pending, the latest first
    silent: bool = False  # completions never come
    lost_interrupts: bool = False  # completions come without an interrupt
    wrong_id: bool = False  # a used id that was not given out
    repeated_id: bool = False  # the used id before this one, again
    index_jump: int = 0  # the used index goes that much too far
    stuck_reset: bool = False  # device_status never reads 0 again
    slow_reset: int = 0  # device_status reads 0 only after so many reads
    refuse_features: bool = False
    restless: bool = False  # config_generation changes all the time
    unplugged: bool = False  # every register reads as ones
    removed: bool = False  # the function is not there any more, and touching its registers would kill
    needs_classic_queues: bool = False  # dead until inflate and deflate are set up, as in cloud-hypervisor
    most_frames: int = 0  # a classic buffer with more is never completed, as by Firecracker; 0 is no limit


class Clock:
    """Time that passes when somebody waits or sleeps, and a little by being looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.5)
