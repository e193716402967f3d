"""A guest of 4 GiB goes from 4096 to 1024 MiB and back: with the kernel's driver, and with the agent's sources.

In each machine twice over: with memory that the guest has never used, and after it has used all of it.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
# How each driver is started: options of the agent, or None for the kernel's own.
DRIVERS: dict[str, Sequence[str] | None] = {
    "kernel": None,
    "blocks": ("--sources", "blocks,thp,pages"),
    "thp": ("--sources", "thp,pages"),
}
STATES = ("untouched", "touched")
# The agent's phases that are not about finding and zeroing memory.
OVERHEAD = ("translate", "post", "verify", "ledger")
Say = Callable[[str], None]


@dataclass
class Cycle:
    """Down to 1024 MiB and back up."""

    inflate_seconds: float
    deflate_seconds: float


@dataclass
class Figures:
    """One driver, one state of the guest's memory. Medians over all cycles; sizes in KiB, throughput in GiB/s."""

    cycles: list[Cycle] = field(default_factory=list)
    rss_above_start_kib: int = 0
    # Of the agent's time while inflating, by phase: seconds over all cycles. Empty for the kernel's driver.
    phase_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def inflate_gib_per_second(self) -> float:
        return MOVED_GIB / statistics.median(cycle.inflate_seconds for cycle in self.cycles)

    @property
    def deflate_gib_per_second(self) -> float:
        return MOVED_GIB / statistics.median(cycle.deflate_seconds for cycle in self.cycles)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "inflate_gib_per_second": self.inflate_gib_per_second,
            "deflate_gib_per_second": self.deflate_gib_per_second,
        }


def measure(driver: str, say: Say, *, cycles: int, append: Sequence[str] = ()) -> dict[str, Figures]:
    """One machine, one driver: its figures for each state."""
    options = DRIVERS[driver]
    say("booting a guest of 4 GiB")
    with VirtualMachine(memory_mib=LARGE_MIB, cpus=1, devices=[DEVICE], append=append) as machine:
        agent: AbstractContextManager[Any] = nullcontext() if options is None else running_agent(machine, *options)
        with agent:
            results = {}
            for state in STATES:
                figures = results[state] = Figures()
                for number in range(cycles + 1):
                    if state == "touched":
                        touch(machine)
                    before = phases(machine) if options is not None else {}
                    if number == cycles:
                        # A machine whose Rss is looked at all the time is not one to time.
                        figures.rss_above_start_kib = rss_above_start(machine)
                        machine.set_balloon(LARGE_MIB)
                        machine.wait_balloon(LARGE_MIB, STEP_DEADLINE)
                        continue
                    inflate = timed(machine, SMALL_MIB)
                    for phase, seconds in (phases(machine) if options is not None else {}).items():
                        figures.phase_seconds[phase] = figures.phase_seconds.get(phase, 0.0) + seconds - before[phase]
                    deflate = timed(machine, LARGE_MIB)
                    figures.cycles.append(Cycle(inflate, deflate))
                    say(f"{state}: to {SMALL_MIB} MiB in {inflate:.3f} s, back in {deflate:.3f} s")
                say(f"{state}: host's Rss at most {figures.rss_above_start_kib / 1024:.1f} MiB above its start")
            return results


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


def ratios(measured: dict[str, dict[str, Figures]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each of the agent's drivers as a multiple of the kernel's, by state; and the share of its time that is not populating."""
    kernel = measured["kernel"]
    return {
        driver: {
            state: {
                "inflate": figures.inflate_gib_per_second / kernel[state].inflate_gib_per_second,
                "deflate": figures.deflate_gib_per_second / kernel[state].deflate_gib_per_second,
                "overhead": overhead(figures),
            }
            for state, figures in states.items()
        }
        for driver, states in measured.items()
        if driver != "kernel"
    }


def overhead(figures: Figures) -> float:
    """Translating, packing, posting and bookkeeping as a share of the whole time of inflating."""
    return sum(figures.phase_seconds.get(phase, 0.0) for phase in OVERHEAD) / sum(
        cycle.inflate_seconds for cycle in figures.cycles
    )
