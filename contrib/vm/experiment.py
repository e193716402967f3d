"""The experiment of the proposal that this project began with, on one VM and with one driver.

A guest of 1 GiB touches 800 MiB and frees every second 4 KiB page. The host asks for 600 MiB, then for 1024 MiB again; then
the guest touches 800 MiB anew. At each step: how much of the guest's memory the host has in transparent huge pages.

To the letter the guest's memory is in huge pages, as Debian's kernel has it by default: what is freed in them is neither used
nor free until the kernel splits them. In small pages it is free at once.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine import GuestError, Process, VirtualMachine
from .smaps import GuestRam
from .workload import guestmem

GUEST_MIB, SMALL_MIB, TOUCHED_MIB = 1024, 600, 800
BALLOON_DEVICE = "virtio-balloon-pci,cont-pages=on,id=balloon1"
REPORTING_DEVICE = f"{BALLOON_DEVICE},free-page-reporting=on"
# Published with the proposal, for its own host: AnonHugePages in KiB.
PUBLISHED = {
    "kernel driver, 4 KiB (published)": {"touched": 911360, "inflated": 88064, "reused": 65536},
    "kernel driver, CONT_PAGES (published)": {"touched": 911360, "inflated": 616448, "reused": 907264},
}
# Kinds of pages that the guest's memory lies in, and guestmem's options for them.
HUGE_PAGES, SMALL_PAGES = "huge", "small"
PUNCHED = {HUGE_PAGES: ("--huge",), SMALL_PAGES: ()}
STEPS = ("touched", "inflated", "reused")
STEP_DEADLINE = 300.0
# What the agent leaves by default is out of reach at 600 MiB: the guest has some 18 MiB then, a few more or less each time.
RESERVE = ("--reserve", "8M")
BIN = Path(sys.executable).parent
Say = Callable[[str], None]


@dataclass
class Result:
    """One run's figures, as contrib/demo writes them."""

    anon_huge_kib: dict[str, int] = field(default_factory=dict)
    rss_kib: dict[str, int] = field(default_factory=dict)
    actual_mib: dict[str, float] = field(default_factory=dict)
    # MemFree of the guest after it has freed every second page.
    guest_free_mib: float = 0.0
    inflate_seconds: float = 0.0
    deflate_seconds: float = 0.0
    lost_thp_kib: int = 0
    host_free_gained_kib: int = 0
    held_mib: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def lost_thp_kib(before: GuestRam, after: GuestRam) -> int:
    """Memory that used to lie in huge pages, was not given back, and no longer does: what is there in small pages, more."""
    return (after.rss_kib - after.anon_huge_kib) - (before.rss_kib - before.anon_huge_kib)


def host_free_kib() -> int:
    """MemFree of the host: Rss would count as freed what lies in huge pages that stay allocated whole."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1])
    raise LookupError("/proc/meminfo has no MemFree")


def settled_host_free_kib() -> int:
    """MemFree once it has stopped moving: discarding and unmapping return pages to the host in batches."""
    last = host_free_kib()
    for _ in range(40):
        time.sleep(0.1)
        now = host_free_kib()
        if abs(now - last) < 256:
            return now
        last = now
    return last


def agent_command(*arguments: str) -> list[str]:
    """balloon-agent of this checkout's environment, which the guest sees at the same path."""
    return [str(BIN / "balloon-agent"), *arguments]


def ctl_command(*arguments: str) -> list[str]:
    return [str(BIN / "balloonctl"), *arguments]


def running_agent(machine: VirtualMachine, *options: str) -> AbstractContextManager[Process]:
    """An agent in the guest, up and driving the device; asked to stop at the end, with GuestError if it does not do so well."""
    return driving(machine.start(agent_command("run", *options)))


@contextmanager
def driving(agent: Process) -> Iterator[Process]:
    """The same with one that has just been started."""
    agent.wait_for("driving", STEP_DEADLINE)
    try:
        yield agent
    except BaseException as error:
        error.add_note(f"the agent's log:\n{agent.err}")
        with suppress(GuestError):
            agent.signal(signal.SIGTERM)
            agent.wait(STEP_DEADLINE)
        raise
    if agent.code is None:
        agent.signal(signal.SIGTERM)
    agent.wait(STEP_DEADLINE).check()


def boot(say: Say, device: str = BALLOON_DEVICE, qemu: Path | None = None) -> VirtualMachine:
    """The machine of the experiment, not yet entered."""
    say("booting a guest of 1 GiB with one CPU")
    return VirtualMachine(memory_mib=GUEST_MIB, cpus=1, devices=[device], qemu=qemu)


def run(
    driver: str,
    say: Say,
    memory: str = HUGE_PAGES,
    device: str = BALLOON_DEVICE,
    qemu: Path | None = None,
    options: Sequence[str] = (),
) -> Result:
    """The experiment with ``driver``: ``kernel`` (the guest's own) or ``agent``, on our QEMU or another one."""
    with boot(say, device, qemu) as machine:
        agent: AbstractContextManager[Process | None] = nullcontext()
        if driver == "agent":
            say("starting balloon-agent in it")
            agent = running_agent(machine, *RESERVE, *options)
        with agent:
            return _measure(machine, driver, memory, say)


def _measure(machine: VirtualMachine, driver: str, memory: str, say: Say) -> Result:
    result = Result()

    def note(step: str) -> GuestRam:
        ram = machine.guest_ram()
        result.anon_huge_kib[step] = ram.anon_huge_kib
        result.rss_kib[step] = ram.rss_kib
        say(f"{step}: AnonHugePages {ram.anon_huge_kib} kB, Rss {ram.rss_kib} kB")
        return ram

    program = str(guestmem())
    say(f"the guest touches {TOUCHED_MIB} MiB in {memory} pages and frees every second page of 4 KiB")
    user = machine.start([program, "punch", str(TOUCHED_MIB), *PUNCHED[memory]], keep_stdin=True)
    user.wait_for("ready", STEP_DEADLINE)
    result.guest_free_mib = int(machine.shell("grep MemFree /proc/meminfo").split()[1]) / 1024
    touched = note("touched")
    free_before = settled_host_free_kib()

    say(f"the host asks for {SMALL_MIB} MiB")
    machine.set_balloon(SMALL_MIB)
    result.inflate_seconds = machine.wait_balloon(SMALL_MIB, STEP_DEADLINE)
    result.actual_mib[str(SMALL_MIB)] = machine.balloon_actual() / 2**20
    inflated = note("inflated")
    result.lost_thp_kib = max(0, lost_thp_kib(touched, inflated))
    result.host_free_gained_kib = settled_host_free_kib() - free_before
    if driver == "agent":
        result.held_mib = _held(machine)

    say(f"the host asks for {GUEST_MIB} MiB again")
    machine.set_balloon(GUEST_MIB)
    result.deflate_seconds = machine.wait_balloon(GUEST_MIB, STEP_DEADLINE)
    result.actual_mib[str(GUEST_MIB)] = machine.balloon_actual() / 2**20
    user.close_stdin()
    user.wait(STEP_DEADLINE).check()

    say(f"the guest touches {TOUCHED_MIB} MiB anew")
    user = machine.start([program, "touch", str(TOUCHED_MIB), "--huge"], keep_stdin=True)
    user.wait_for("ready", STEP_DEADLINE)
    note("reused")
    user.close_stdin()
    user.wait(STEP_DEADLINE).check()
    return result


def _held(machine: VirtualMachine) -> dict[str, float]:
    status = json.loads(machine.run(ctl_command("status", "--json")).check().out)
    return {source: size / 2**20 for source, size in status["held_bytes"].items()}
