"""The governor: how big the balloon should be, and why. A pure function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from balloon_agent.frames import FRAME
from balloon_agent.size import format_size


class Mode(StrEnum):
    """The balloon follows the host's target, has a size set by hand, or holds the size of the moment that it was told to."""

    FOLLOW = "follow"
    MANUAL = "manual"
    HOLD = "hold"


@dataclass(frozen=True)
class Wishes:
    """What everybody wants of the balloon. Sizes in bytes.

    ``size`` goes with the modes manual and hold. The balloon can have ``ram`` bytes, and the host can sensibly ask for
    ``most``, the machine's memory. ``now`` is what it has. ``lower`` and ``upper`` are limits that somebody has set. ``cap`` is
    what the guest's need of memory leaves, if any; ``below_target``, whether that counts where the host asks for more.
    """

    host_target: int
    ram: int
    most: int
    now: int
    mode: Mode = Mode.FOLLOW
    size: int = 0
    lower: int = 0
    upper: int | None = None
    cap: int | None = None
    below_target: bool = True


@dataclass(frozen=True)
class Decision:
    """The size that the balloon should have, in bytes, and the reason in words. ``wanted`` is that without the guest's need."""

    size: int
    reason: str
    wanted: int


def decide(wishes: Wishes) -> Decision:
    """Who asks comes first, then the limits, and last and above all what the guest needs."""
    wanted, reason = _asked(wishes)
    if wanted > wishes.ram:
        reason = f"{reason} is {wanted} bytes, more than the guest's {wishes.ram}"
        wanted = wishes.ram
    if wishes.upper is not None and wanted > wishes.upper:
        wanted, reason = wishes.upper, f"the upper limit; {reason} is {format_size(wanted)}"
    elif wanted < wishes.lower:
        wanted, reason = min(wishes.lower, wishes.ram), f"the lower limit; {reason} is {format_size(wanted)}"
    wanted = wanted // FRAME * FRAME
    if wishes.cap is None or wishes.cap >= wanted:
        return Decision(wanted, reason, wanted)
    needed = f"the guest needs memory; {reason} is {format_size(wanted)}"
    if wishes.below_target or wishes.cap > wishes.host_target:
        return Decision(wishes.cap // FRAME * FRAME, needed, wanted)
    # Without DEFLATE_ON_OOM the host's target is not ours to fall below.
    size = min(wanted, wishes.host_target) // FRAME * FRAME
    return Decision(size, f"{needed}, and the host forbids less than its target", wanted)


def _asked(wishes: Wishes) -> tuple[int, str]:
    match wishes.mode:
        case Mode.MANUAL:
            return wishes.size, "set by hand"
        case Mode.HOLD:
            return wishes.size, "held as it was"
    if wishes.host_target > wishes.most:
        # It is wrong about the machine: the balloon stays as it is.
        return wishes.now, f"not the host's target: that is {wishes.host_target} bytes, and the machine has {wishes.most}"
    return wishes.host_target, "the host's target"


def reserve_for(ram: int) -> int:
    """Bytes above the kernel's own reserves that inflating leaves to the guest by default: 5 % of its RAM, 64 MiB or more."""
    return max(64 << 20, ram // 20)
