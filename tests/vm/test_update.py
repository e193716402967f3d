"""The service is brought up to date from an earlier version while memory is in the balloon: no peak, and nothing lost.

On a Debian system that systemd runs, as in test_install.py; the tests of this file share one guest.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contrib.vm import REPOSITORY, VirtualMachine
from contrib.vm.workload import guestmem
from tests.vm.conftest import MEMORY_MIB, Stage, address_of_balloon, driver_of_balloon, kernel_driver_works
from tests.vm.test_install import (
    CONFIG,
    HELD,
    INSTALL_DEADLINE,
    PARTS,
    SERVICE,
    SMALL_MIB,
    Guest,
    balloon,
    boot,
    held,
    journal,
    listing,
    nothing_is_held,
    show,
    source,
    up,
)
from tests.vm.tools import pattern

# The last one before holders, locks and records were hardened. Whatever is changed, it must be possible to come from there.
EARLIER = "803e6bc1b631ad28d8bb97b35164fb5458ba3d1d"
# An empty holder has some 5 MiB.
HOLDS_MIB = 20
# Counts the looks at which the kernel's driver had the device, and those of them at which something was held: blocks offline,
# or memory of holders. The driver is looked at before and after, since it may change meanwhile.
WATCH = f"""
import os, select, sys
from pathlib import Path

def driver():
    try:
        return os.path.basename(os.readlink(f"/sys/bus/pci/devices/{{sys.argv[1]}}/driver"))
    except OSError:
        return ""

def lines(path):
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []

def held():
    blocks = Path("/sys/devices/system/memory").glob("memory*/state")
    found = [f"{{path}} offline" for path in blocks if lines(path) == ["offline"]]
    for process in Path("/proc").glob("[1-9]*"):
        if any("balloon_agent" in line and "holder" in line for line in lines(process / "cmdline")):
            sizes = [int(line.split()[1]) >> 10 for line in lines(process / "status") if line.startswith("RssAnon:")]
            found += [f"{{process}} holds {{size}} MiB" for size in sizes if size > {HOLDS_MIB}]
    return found

print("ready", flush=True)
looks = wrong = 0
while not select.select([0], [], [], 0.01)[0]:
    if driver() != "virtio-pci":
        continue
    found = held()
    if driver() == "virtio-pci":
        looks += 1
        wrong += bool(found)
        if found:
            print("HELD", found, flush=True)
print("looks", looks, "wrong", wrong)
"""


def earlier(folder: Path, archive: Path) -> None:
    """Add that version to the archive, with its wheel, and the program that would notice corruption."""
    if subprocess.run(["git", "-C", REPOSITORY, "cat-file", "-e", f"{EARLIER}^{{commit}}"], check=False).returncode:
        pytest.skip(f"this clone has no commit {EARLIER} to come from: git fetch --unshallow")
    checkout = folder / "earlier"
    checkout.mkdir()
    git = subprocess.Popen(["git", "-C", REPOSITORY, "archive", EARLIER, *PARTS], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-C", checkout, "-x"], stdin=git.stdout, check=True)
    assert git.wait() == 0
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
    subprocess.run([*pip, "--wheel-dir", folder / "earlier-wheels", checkout], check=True)
    tar = ("tar", "--owner=0", "--group=0", "-rf", archive)
    subprocess.run([*tar, "-C", folder, "--exclude=build", "earlier", "earlier-wheels"], check=True)
    subprocess.run([*tar, "-C", guestmem().parent, guestmem().name], check=True)


@pytest.fixture(scope="module")
def fresh(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Booted, with nothing of ours but what is to be installed."""
    folder = tmp_path_factory.mktemp("update")
    archive = source(folder)
    earlier(folder, archive)
    machine = boot(stage, "updated", archive)
    # All that both need, and of each its own.
    machine.shell(
        "cd /opt/source; for wheel in wheels/*; do case $wheel in */balloon_agent-*) ;; *) cp $wheel earlier-wheels; esac; done"
    )
    return Guest(machine, listing(machine))


@contextmanager
def sizes(machine: VirtualMachine) -> Iterator[set[int]]:
    """Every size in bytes that the guest has had by the host's account, as often as the monitor can be asked."""
    seen: set[int] = set()
    ending = threading.Event()

    def look() -> None:
        while not ending.wait(0.01):
            seen.add(machine.balloon_actual())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ending.set()
        thread.join()


@contextmanager
def nobody_holds_what_the_kernel_has(machine: VirtualMachine) -> Iterator[None]:
    watcher = machine.start(["python3", "-I", "-S", "-c", WATCH, address_of_balloon(machine)], keep_stdin=True)
    watcher.wait_for("ready", 60)
    yield
    watcher.close_stdin()
    said = watcher.wait(60).check().out
    assert said.endswith("wrong 0\n"), said


def install(machine: VirtualMachine, checkout: str, wheels: str, *options: str) -> str:
    command = shlex.join([f"{checkout}/deploy/install", "--wheels", wheels, *options])
    return machine.shell(f"cd /opt/source && {command} 2>&1", timeout=INSTALL_DEADLINE)


@pytest.mark.long
@pytest.mark.parametrize("on_stop", ["keep", "deflate"])
def test_brought_up_to_date_with_memory_in_the_balloon_nothing_is_lost(fresh: Guest, on_stop: str) -> None:
    machine = fresh.machine
    assert "installed, and running" in install(machine, "earlier", "earlier-wheels")
    machine.shell(f"""printf 'on-stop = "{on_stop}"\\n' >{CONFIG}; systemctl reload {SERVICE}""")
    # All but the end, which an emulated guest needs minutes for. A file that is missing then is something to be changed.
    assert "the version before runs until it is stopped" in install(machine, "checkout", "wheels", "--no-start")
    machine.shell("rm /usr/local/share/man/man1/balloonctl.1")
    balloon(machine, SMALL_MIB)
    assert held(machine).keys() == {"blocks", "thp"}
    before, pid = held(machine), show(machine, "MainPID")

    with pattern(machine, f"/opt/source/{guestmem().name}"), nobody_holds_what_the_kernel_has(machine), sizes(machine) as seen:
        assert "brought up to date, and started again" in install(machine, "checkout", "wheels")
        machine.wait_balloon(SMALL_MIB, 120)
    up(machine)
    assert show(machine, "MainPID") != pid
    assert driver_of_balloon(machine) == "uio_pci_generic"
    assert sum(held(machine).values()) == HELD
    if on_stop == "keep":
        # Nothing was given back in between, nor was anything else taken.
        assert seen == {SMALL_MIB << 20}
        assert held(machine) == before
        assert f"an earlier agent left {HELD >> 20} MiB in the balloon" in journal(machine)
    # Never more than the host has asked for.
    assert min(seen) == SMALL_MIB << 20
    balloon(machine, MEMORY_MIB)
    assert held(machine) == {}

    balloon(machine, SMALL_MIB)
    assert machine.shell("/opt/source/checkout/deploy/uninstall --purge 2>&1") == "uninstall: removed\n"
    nothing_is_held(machine)
    machine.wait_balloon(SMALL_MIB, 60)
    kernel_driver_works(machine)
    assert listing(machine) ^ fresh.before == set()
    assert machine.shell("ls -d /run/balloon-agent* /run/lock/balloon-agent* 2>/dev/null || true") == ""
