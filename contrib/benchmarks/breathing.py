"""A guest of 4 GiB goes from 4096 to 1024 MiB and back: with the kernel's driver, and with the agent's sources.

With memory that the guest has never used, and after it has used all of it. Two machines take turns, a second or two each, for
how fast this one is changes from minute to minute.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from contrib.vm.experiment import BALLOON_DEVICE, STEP_DEADLINE, ctl_command, running_agent
from contrib.vm.machine import VirtualMachine
from contrib.vm.workload import guestmem

LARGE_MIB, SMALL_MIB = 4096, 1024
MOVED_GIB = (LARGE_MIB - SMALL_MIB) / 1024
# What all programs of the guest together could have used: nearly everything.
TOUCHED_MIB = 3600
DEVICE = BALLOON_DEVICE
SOURCES = {"blocks": "blocks,thp,pages", "thp": "thp,pages"}
STATES = ("untouched", "touched")
# The agent's phases that are about telling the host of memory; and those that see to it that it stays where it is.
TELLING = ("translate", "post", "ledger")
KEEPING = ("pin", "verify")
Say = Callable[[str], None]


@dataclass
class Cycle:
    """Down to 1024 MiB and back up: seconds, of the kernel's driver and of the agent right after it."""

    kernel_inflate: float
    kernel_deflate: float
    inflate: float
    deflate: float


@dataclass
class Figures:
    """One choice of sources, one state of the guest's memory. Phases are the agent's seconds while inflating, in all cycles."""

    cycles: list[Cycle] = field(default_factory=list)
    rss_above_start_kib: int = 0
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        cycles = self.cycles
        return {
            **asdict(self),
            "kernel_inflate_gib_per_second": MOVED_GIB / statistics.median(cycle.kernel_inflate for cycle in cycles),
            "kernel_deflate_gib_per_second": MOVED_GIB / statistics.median(cycle.kernel_deflate for cycle in cycles),
            "inflate_gib_per_second": MOVED_GIB / statistics.median(cycle.inflate for cycle in cycles),
            "deflate_gib_per_second": MOVED_GIB / statistics.median(cycle.deflate for cycle in cycles),
            # Of what was measured within seconds of one another, so that the weather is the same.
            "inflate_ratio": statistics.median(cycle.kernel_inflate / cycle.inflate for cycle in cycles),
            "deflate_ratio": statistics.median(cycle.kernel_deflate / cycle.deflate for cycle in cycles),
            "telling_share": self._share(TELLING),
            "keeping_share": self._share(KEEPING),
            "kernel_share": self._share(("populate",)),
        }

    def _share(self, phases: Sequence[str]) -> float:
        """Of the time of all inflates."""
        return sum(self.phase_seconds.get(phase, 0.0) for phase in phases) / sum(cycle.inflate for cycle in self.cycles)


def measure(sources: str, say: Say, kernel: VirtualMachine, *, cycles: int, append: Sequence[str] = ()) -> dict[str, Figures]:
    """The agent in a machine of its own, in turns with the one named ``kernel``: figures for each state."""
    say("booting a guest of 4 GiB")
    with boot(append) as machine, running_agent(machine, "--sources", SOURCES[sources]):
        # The worker and the first holder are up once something was held.
        machine.set_balloon(LARGE_MIB - 256)
        machine.wait_balloon(LARGE_MIB - 256, STEP_DEADLINE)
        timed(machine, LARGE_MIB)
        results = {}
        for state in STATES:
            figures = results[state] = Figures()
            for _ in range(cycles):
                if state == "touched":
                    touch(kernel)
                    touch(machine)
                theirs = timed(kernel, SMALL_MIB), timed(kernel, LARGE_MIB)
                before = phases(machine)
                inflate = timed(machine, SMALL_MIB)
                for phase, seconds in phases(machine).items():
                    figures.phase_seconds[phase] = figures.phase_seconds.get(phase, 0.0) + seconds - before[phase]
                cycle = Cycle(*theirs, inflate, timed(machine, LARGE_MIB))
                figures.cycles.append(cycle)
                say(
                    f"{state}: to {SMALL_MIB} MiB in {cycle.inflate:.3f} s, back in {cycle.deflate:.3f} s; the kernel's driver "
                    f"took {cycle.kernel_inflate / cycle.inflate:.1f} and {cycle.kernel_deflate / cycle.deflate:.1f} times that"
                )
            if state == "touched":
                touch(machine)
            # A machine whose Rss is looked at all the time is not one to time.
            figures.rss_above_start_kib = rss_above_start(machine)
            timed(machine, LARGE_MIB)
            say(f"{state}: host's Rss at most {figures.rss_above_start_kib / 1024:.1f} MiB above its start")
        return results


def boot(append: Sequence[str]) -> VirtualMachine:
    """The machine to measure in, not yet entered."""
    return VirtualMachine(memory_mib=LARGE_MIB, cpus=1, devices=[DEVICE], append=append)


def touch(machine: VirtualMachine) -> None:
    """Have the guest use nearly all its memory, and let go of it."""
    user = machine.start([str(guestmem()), "touch", str(TOUCHED_MIB), "--huge"], keep_stdin=True)
    user.wait_for("ready", STEP_DEADLINE)
    user.close_stdin()
    user.wait(STEP_DEADLINE).check()


def timed(machine: VirtualMachine, guest_mib: int) -> float:
    """Seconds until the balloon is where the host wants it."""
    begin = time.monotonic()
    machine.set_balloon(guest_mib)
    machine.wait_balloon(guest_mib, STEP_DEADLINE)
    return time.monotonic() - begin


def phases(machine: VirtualMachine) -> dict[str, float]:
    """The agent's time by phase so far."""
    status = json.loads(machine.run(ctl_command("status", "--json")).check().out)
    return {str(phase): float(seconds) for phase, seconds in status["phase_seconds_total"].items()}


def rss_above_start(machine: VirtualMachine) -> int:
    """How far the host's Rss of guest RAM rises above its start, at most, while the guest shrinks to 1024 MiB: KiB."""
    start = machine.guest_ram().rss_kib
    with sampling(lambda: machine.guest_ram().rss_kib) as seen:
        timed(machine, SMALL_MIB)
    return max(seen) - start


@contextmanager
def sampling(look: Callable[[], int]) -> Iterator[list[int]]:
    """What ``look`` returns, over and over, from a thread, until the block ends."""
    seen = [look()]
    stopping = threading.Event()

    def sample() -> None:
        while not stopping.is_set():
            seen.append(look())

    thread = threading.Thread(target=sample, name="sampling")
    thread.start()
    try:
        yield seen
    finally:
        stopping.set()
        thread.join()
