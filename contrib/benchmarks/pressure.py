"""A guest with a large balloon in which a program begins to need memory: who gets it, how soon, and who is killed for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from contrib.vm.experiment import STEP_DEADLINE, ctl_command, running_agent
from contrib.vm.machine import GuestError, VirtualMachine
from contrib.vm.workload import guestmem

from .breathing import Say

GUEST_MIB, BALLOON_MIB, NEEDED_MIB = 1024, 700, 600
DEVICE = "virtio-balloon-pci,cont-pages=on,deflate-on-oom=on,id=balloon1"
# How many processes the guest's kernel has killed for want of memory; and who they were, by name and oom_score_adj: a holder is
# nobody else's first choice.
OOM_KILLS = "grep -w oom_kill /proc/vmstat"
KILLED = r"dmesg | sed -n 's/.*Killed process [0-9]* (\([^)]*\)).*oom_score_adj:\(-*[0-9]*\).*/\1 \2/p'"
# What the kernel has told of it, without the lists of all processes.
TOLD = r"dmesg | grep -vE '\] \[ *[0-9]+\]' || true"
# How each is started: options of the agent, or None for the kernel's own driver.
KINDS: dict[str, tuple[str, ...] | None] = {
    "kernel": None,
    "thp": ("--sources", "thp,pages"),
    "blocks": ("--sources", "blocks,thp,pages"),
    "fuse": ("--sources", "thp,pages", "--no-relief"),
    # With a swap device, compressed in the guest's own memory.
    "zram": ("--sources", "thp,pages"),
}
ZRAM_MIB = 512


@dataclass
class Need:
    """One program's: seconds until it had its memory, or None if it never did; who was killed for want of memory.

    What was left in the balloon when it had it, in MiB; and how many seconds after the program's end it was back.
    """

    seconds: float | None
    oom_kills: int
    killed: list[str]
    balloon_mib: int
    return_seconds: float

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


def needs(machine: VirtualMachine, kind: str, runs: int, say: Say, options: Sequence[str] = ()) -> list[Need]:
    """So many programs, one after the other, each with the balloon back at its size before. The balloon is empty at the end."""
    agent = KINDS[kind]
    if agent is not None:
        with zram(machine) if kind == "zram" else nullcontext(), running_agent(machine, *agent, *options):
            # By hand, which is what the host's target of nothing does not change.
            machine.run(ctl_command("set", f"{BALLOON_MIB}M"), timeout=STEP_DEADLINE).check()
            return [_need(machine, say, returns=True) for _ in range(runs)]
    found: list[Need] = []
    try:
        for _ in range(runs):
            # What the kernel's driver has given back it takes again when the host asks anew, and not before.
            machine.set_balloon(GUEST_MIB - BALLOON_MIB)
            found.append(_need(machine, say, returns=False))
        return found
    finally:
        machine.set_balloon(GUEST_MIB)


@contextmanager
def zram(machine: VirtualMachine) -> Iterator[None]:
    """A guest that swaps to its own memory, as many do by default."""
    machine.shell(f"modprobe zram; echo {ZRAM_MIB}M >/sys/block/zram0/disksize; mkswap /dev/zram0; swapon /dev/zram0")
    try:
        yield
    finally:
        machine.shell("swapoff /dev/zram0; rmmod zram")


def _need(machine: VirtualMachine, say: Say, *, returns: bool) -> Need:
    machine.wait_balloon(GUEST_MIB - BALLOON_MIB, STEP_DEADLINE)
    # Who is killed is told at length, and there is room for so much only.
    before = int(machine.shell(f"dmesg --clear; {OOM_KILLS}").split()[1])
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
    begin = time.monotonic()
    if returns and seconds is not None:
        machine.wait_balloon(GUEST_MIB - BALLOON_MIB, STEP_DEADLINE)
    back = time.monotonic() - begin
    count, *names = machine.shell(f"{OOM_KILLS}; {KILLED}").splitlines()
    need = Need(seconds, int(count.split()[1]) - before, names, balloon, back)
    took = "never had its memory" if seconds is None else f"had its memory after {seconds:.2f} s"
    say(f"{took}; {need.oom_kills} killed {need.killed}; {need.balloon_mib} MiB left, back after {back:.1f} s")
    if seconds is None:
        say(machine.shell(TOLD))
    return need


def summary(result: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each kind: how many programs had their memory, how soon at best, in the middle and at worst, and who was killed."""
    shown: dict[str, Any] = {}
    for kind, runs in result.items():
        seconds = sorted(run["seconds"] for run in runs if run["seconds"] is not None)
        names = [name for run in runs for name in run["killed"]]
        shown[kind] = {
            "programs": len(runs),
            "finished": len(seconds),
            "seconds": [seconds[0], seconds[len(seconds) // 2], seconds[-1]] if seconds else [],
            "holders_killed": sum(name.endswith(" 1000") for name in names),
            "others_killed": sum(not name.endswith(" 1000") for name in names),
        }
    return shown
