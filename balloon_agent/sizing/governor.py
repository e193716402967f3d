"""The governor: how big the balloon should be, and why. A pure function."""

from __future__ import annotations

from dataclasses import dataclass

from balloon_agent.memory.frames import FRAME


@dataclass(frozen=True)
class Decision:
    """The size that the balloon should have, in bytes, and the reason in words."""

    size: int
    reason: str


def decide(host_target: int, manual: int | None, ram: int, most: int, now: int) -> Decision:
    """``manual`` bytes if somebody has set the balloon by hand, else what the host asks; never more than ``ram``.

    A host that asks for more than the machine has (``most``) is wrong about the machine: the balloon stays as it is ``now``.
    """
    if manual is None and host_target > most:
        return Decision(now, f"not the host's target: that is {host_target} bytes, and the machine has {most}")
    if manual is not None:
        wanted, reason = manual, "set by hand"
    else:
        wanted, reason = host_target, "the host's target"
    if wanted > ram:
        return Decision(ram // FRAME * FRAME, f"{reason} is {wanted} bytes, more than the guest's {ram}")
    return Decision(wanted // FRAME * FRAME, reason)


def reserve_for(ram: int) -> int:
    """Bytes above the kernel's own reserves that inflating leaves to the guest by default: 5 % of its RAM, 64 MiB or more."""
    return max(64 << 20, ram // 20)
