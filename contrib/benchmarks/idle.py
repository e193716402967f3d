"""What an agent with nothing to do costs: its memory, its processor time, and how long it takes to ask it how it is.

And how long a scrape takes while the balloon moves, on the guest's only processor.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from contrib.vm.experiment import BALLOON_DEVICE, BIN, STEP_DEADLINE, ctl_command, running_agent
from contrib.vm.machine import VirtualMachine

from .breathing import Say, timed

GUEST_MIB, BALLOON_MIB = 1024, 512
SCRAPE = "busybox wget -qO /dev/null http://127.0.0.1:9758/metrics"
# So often each; the first one finds nothing in the guest's cache, and is left out.
TIMES = 11
# For the time of a command: the shell's own, in seconds, one line each.
TIMED = "TIMEFORMAT=%R; for i in $(seq {times}); do time {command} >/dev/null; done"
IDLE_SECONDS = 10
# User and system time of a process, in ticks, and its name before them (proc(5)).
_STAT = re.compile(r"\) \S(?: \S+){10} (\d+) (\d+)")


def measure(say: Say) -> dict[str, Any]:
    """For JSON: MiB, seconds, and the share of a processor."""
    say("booting a guest of 1 GiB with one CPU")
    with VirtualMachine(GUEST_MIB, devices=[BALLOON_DEVICE], cache=True) as machine, running_agent(machine):
        machine.set_balloon(GUEST_MIB - BALLOON_MIB)
        machine.wait_balloon(GUEST_MIB - BALLOON_MIB, STEP_DEADLINE)
        result: dict[str, Any] = {"balloon_mib": BALLOON_MIB}
        for name, words in (("status", ("status",)), ("status_json", ("status", "--json"))):
            result[f"{name}_seconds"] = _times(machine, " ".join(ctl_command(*words)))
        # What no program in Python can be faster than, in this guest.
        result["python_seconds"] = _times(machine, f"{BIN / 'python'} -c pass")
        pid = json.loads(machine.run(ctl_command("status", "--json")).check().out)["pid"]
        result["scrape_seconds"] = _times(machine, SCRAPE)
        result["agent_rss_mib"] = _rss(machine, pid)
        result["idle_cpu_share"] = _idle_share(machine, pid)
        with _moving(machine):
            result["moving_scrape_seconds"] = _times(machine, SCRAPE)
        say(json.dumps(result))
        return result


@contextmanager
def _moving(machine: VirtualMachine) -> Iterator[None]:
    """The balloon goes down and up all the time."""
    stopping = threading.Event()

    def move() -> None:
        while not stopping.is_set():
            timed(machine, GUEST_MIB)
            timed(machine, GUEST_MIB - BALLOON_MIB)

    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(move)
        try:
            yield
        finally:
            stopping.set()
        moving.result()


def _times(machine: VirtualMachine, command: str) -> dict[str, float]:
    script = TIMED.format(times=TIMES, command=command)
    done = machine.run(["/bin/bash", "-c", script], timeout=STEP_DEADLINE).check()
    seconds = sorted(float(line) for line in done.err.split()[1:])
    return {"best": seconds[0], "median": seconds[len(seconds) // 2], "worst": seconds[-1]}


def _rss(machine: VirtualMachine, pid: int) -> float:
    kib = machine.shell(f"sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/{pid}/status")
    return int(kib) / 1024


def _idle_share(machine: VirtualMachine, pid: int) -> float:
    """Of a processor, while nothing happens."""

    def ticks() -> tuple[int, float]:
        stat, uptime, rate = machine.shell(f"cat /proc/{pid}/stat /proc/uptime; getconf CLK_TCK").splitlines()
        found = _STAT.search(stat)
        assert found is not None, stat
        return sum(int(part) for part in found.groups()), float(uptime.split()[0]) * int(rate)

    used, then = ticks()
    machine.shell(f"sleep {IDLE_SECONDS}")
    used_after, now = ticks()
    return (used_after - used) / (now - then)
