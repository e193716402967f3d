"""A guest with a large balloon in which a program begins to need memory: who gets it, how soon, and who is killed for it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from contrib.vm.experiment import STEP_DEADLINE, running_agent
from contrib.vm.machine import GuestError, VirtualMachine
from contrib.vm.workload import guestmem

from .breathing import Say

GUEST_MIB, BALLOON_MIB, NEEDED_MIB = 1024, 700, 600
DEVICE = "virtio-balloon-pci,cont-pages=on,deflate-on-oom=on,id=balloon1"
# How each is started: options of the agent, or None for the kernel's own driver.
KINDS: dict[str, tuple[str, ...] | None] = {
    "kernel": None,
    "thp": ("--sources", "thp,pages"),
    "blocks": ("--sources", "blocks,thp,pages"),
    "fuse": ("--sources", "thp,pages", "--no-relief"),
}


@dataclass
class Need:
    """One program's: seconds until it had its memory, or None if it never did; and how many were killed for want of memory."""

    seconds: float | None
    oom_kills: int
    balloon_mib: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(kind: str, runs: int, say: Say) -> list[dict[str, Any]]:
    """So many programs in a machine of their own; for JSON."""
    say("booting a guest of 1 GiB with one CPU")
    with boot() as machine:
        return [need.as_dict() for need in needs(machine, kind, runs, say)]


def boot() -> VirtualMachine:
    """The machine to measure in, not yet entered."""
    return VirtualMachine(GUEST_MIB, devices=[DEVICE], cache=True)


def needs(machine: VirtualMachine, kind: str, runs: int, say: Say) -> list[Need]:
    """So many programs, one after the other, each with the balloon back at its size before. The balloon is empty at the end."""
    options = KINDS[kind]
    try:
        if options is None:
            return [_need(machine, say) for _ in range(runs)]
        with running_agent(machine, *options):
            return [_need(machine, say) for _ in range(runs)]
    finally:
        machine.set_balloon(GUEST_MIB)


def _need(machine: VirtualMachine, say: Say) -> Need:
    machine.set_balloon(GUEST_MIB - BALLOON_MIB)
    machine.wait_balloon(GUEST_MIB - BALLOON_MIB, STEP_DEADLINE)
    before = oom_kills(machine)
    user = machine.start([str(guestmem()), "touch", str(NEEDED_MIB)], keep_stdin=True)
    begin = time.monotonic()
    seconds: float | None = None
    try:
        user.wait_for("ready", STEP_DEADLINE)
        seconds = time.monotonic() - begin
    except GuestError:
        pass  # it was killed
    balloon = GUEST_MIB - (machine.balloon_actual() >> 20)
    user.close_stdin()
    user.wait(STEP_DEADLINE)
    need = Need(seconds, oom_kills(machine) - before, balloon)
    say(f"{need.seconds} s, {need.oom_kills} killed, {need.balloon_mib} MiB left in the balloon")
    return need


def oom_kills(machine: VirtualMachine) -> int:
    """How many processes the guest's kernel has killed for want of memory."""
    return int(machine.shell("grep -w oom_kill /proc/vmstat").split()[1])
