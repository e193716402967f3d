"""Memory that hides in holes of huge pages: on a real kernel it is freed for the balloon, and others hardly notice."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contrib.vm import Process, VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, ctl_command, running_agent
from contrib.vm.workload import guestmem
from tests.vm.conftest import MEMORY_MIB, Stage, kernel_driver_works, nothing_left
from tests.vm.tools import pattern, scrape, status

PUNCHED_MIB, CACHED_MIB = 400, 200
# A size for which what hides is needed, and no cache has to go.
GUEST_MIB = 744
GROUPS = "/sys/fs/cgroup"
COUNTERS = ("pswpout", "workingset_refault_file", "thp_split_page", "oom_kill")
# Rounds of reading, before and after.
ROUNDS = 3


@pytest.fixture
def hiding(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> VirtualMachine:
    """A machine with a disk, and on its file system a file of CACHED_MIB."""

    def make() -> VirtualMachine:
        folder: Path = tmp_path_factory.mktemp("hidden")
        (folder / "content").mkdir()
        (folder / "content/file").write_bytes(b"balloons" * (CACHED_MIB << 17))
        disk = folder / "disk"
        command = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(folder / "content"), str(disk), f"{2 * CACHED_MIB}M"]
        subprocess.run(command, check=True)
        options = [f"-drive file={disk},format=raw,if=virtio,readonly=on"]
        return VirtualMachine(MEMORY_MIB, devices=[BALLOON_DEVICE], qemu_options=options, cache=True)

    return stage.machine("hiding", make)


def start_in(machine: VirtualMachine, group: str, command: str) -> Process:
    """A command in a control group of its own, as systemd would have it."""
    machine.shell(f"echo +memory >{GROUPS}/cgroup.subtree_control; mkdir -p {GROUPS}/{group}")
    return machine.start(["/bin/sh", "-c", f"echo $$ >{GROUPS}/{group}/cgroup.procs; {command}"], keep_stdin=True)


def counters(machine: VirtualMachine) -> dict[str, int]:
    lines = (line.split() for line in machine.shell("cat /proc/vmstat").splitlines())
    return {name: int(value) for name, value in lines if name in COUNTERS}


@contextmanager
def reader(machine: VirtualMachine) -> Iterator[Process]:
    """A neighbour that lives on its cache: it reads the same file over and over, which is all in memory now."""
    machine.shell("mkdir -p /run/disk; mountpoint -q /run/disk || mount -o ro /dev/vda /run/disk")
    reads = "cat /run/disk/file >/dev/null && echo round"
    process = start_in(machine, "reader", f"while :; do {reads}; done")
    process.wait_for("round\n" * ROUNDS, 120)
    try:
        yield process
    finally:
        process.signal(signal.SIGKILL)
        process.wait(60)


@contextmanager
def puncher(machine: VirtualMachine) -> Iterator[None]:
    process = start_in(machine, "puncher", f"exec {guestmem()} punch {PUNCHED_MIB} --huge")
    process.wait_for("ready", 120)
    try:
        yield
    finally:
        process.close_stdin()
        process.wait(60).check()


@contextmanager
def without_debugfs(machine: VirtualMachine) -> Iterator[None]:
    # Lazily: tracefs is mounted below.
    machine.shell("umount -l /sys/kernel/debug")
    try:
        yield
    finally:
        machine.shell("mount -t debugfs none /sys/kernel/debug")


@contextmanager
def as_it_is(machine: VirtualMachine) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("surroundings", "means"),
    [(as_it_is, "split"), pytest.param(without_debugfs, "reclaim", marks=pytest.mark.long)],
    ids=["split", "reclaim"],
)
def test_what_hides_is_freed_for_the_balloon_and_a_neighbours_cache_stays(
    hiding: VirtualMachine, surroundings: object, means: str
) -> None:
    machine = hiding
    assert callable(surroundings)
    with surroundings(machine), pattern(machine), reader(machine) as neighbour, puncher(machine), running_agent(machine):
        before, rounds = counters(machine), neighbour.out.count("round")
        assert before.keys() == set(COUNTERS)
        machine.set_balloon(GUEST_MIB)
        machine.wait_balloon(GUEST_MIB, 120)
        deadline = time.monotonic() + 120
        while (read := neighbour.out.count("round") - rounds) < ROUNDS:
            assert time.monotonic() < deadline, "the neighbour does not come to anything"
            time.sleep(0.1)
        after, now = counters(machine), status(machine)
        freed = now["hidden_freed_bytes_total"]
        assert {name for name, size in freed.items() if size} == {means}, now
        assert freed[means] >= 32 << 20, now
        assert f"freed by {means}" in machine.run(ctl_command("status")).check().out
        assert scrape(machine)[f'balloon_hidden_freed_bytes_total{{means="{means}"}}'] == freed[means]
        refaults = after["workingset_refault_file"] - before["workingset_refault_file"]
        assert refaults < read * (CACHED_MIB << 8) // 100, (refaults, read)
        assert (after["pswpout"], after["oom_kill"]) == (before["pswpout"], before["oom_kill"])
        machine.set_balloon(MEMORY_MIB)
        machine.wait_balloon(MEMORY_MIB, 120)
    nothing_left(machine)
    kernel_driver_works(machine)


@pytest.mark.long
def test_with_its_reserve_the_balloon_takes_what_hides_before_it_is_short(hiding: VirtualMachine) -> None:
    machine = hiding
    with pattern(machine), puncher(machine), running_agent(machine):
        short = machine.run(ctl_command("set", "100%", "--timeout", "120", "--json"), timeout=180)
        assert short.code == 3, short
        now = status(machine)
        # A rest of 32 MiB may stay hidden; and hardly any memory is taken in single pages.
        assert now["hidden_freed_bytes_total"]["split"] >= (PUNCHED_MIB // 2 - 32) << 20, now
        assert now["held_bytes"].get("pages", 0) <= 16 << 20, now
        assert counters(machine)["pswpout"] == 0
        machine.run(ctl_command("follow"), timeout=120).check()
    nothing_left(machine)


@pytest.mark.long
def test_single_pages_become_huge_ones_at_rest(hiding: VirtualMachine) -> None:
    machine = hiding
    with pattern(machine):
        with running_agent(machine, "--sources", "pages", "--on-stop", "keep"):
            machine.run(ctl_command("set", "41M"), timeout=120).check()
            assert status(machine)["held_bytes"] == {"pages": 41 << 20}
        with running_agent(machine):
            deadline = time.monotonic() + 240
            while (now := status(machine))["held_bytes"] != {"thp": 40 << 20, "pages": 1 << 20}:
                assert time.monotonic() < deadline, now
                assert now["actual_bytes"] >= 41 << 20, "the host has less than it asks for"
            assert machine.balloon_actual() == (MEMORY_MIB - 41) << 20
            machine.run(ctl_command("follow"), timeout=120).check()
    nothing_left(machine)
    kernel_driver_works(machine)
