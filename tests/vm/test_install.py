"""A fresh Debian system that systemd runs: the agent is installed, obeys the host after a reboot, and leaves without a trace.

The tests of this file share one guest, in the order in which they stand here: fresh, installed, removed.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from contrib.vm import REPOSITORY, VirtualMachine, wheels
from contrib.vm.experiment import BALLOON_DEVICE
from contrib.vm.system import debian_system
from tests.vm.conftest import MEMORY_MIB, PORT, Stage, address_of_balloon, driver_of_balloon, kernel_driver_works
from tests.vm.tools import plug, scrape, unplug

SMALL_MIB = 600
# 300 MiB, of which each second page of 4 KiB is given up again: 150 MiB that hide in huge pages.
PUNCH = """
import mmap, sys
memory = mmap.mmap(-1, 300 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(memory), 4096):
    memory[page] = 1
for page in range(0, len(memory), 8192):
    memory.madvise(mmap.MADV_DONTNEED, page, 4096)
print("ready", flush=True)
sys.stdin.read()
"""
HELD = (MEMORY_MIB - SMALL_MIB) << 20
SERVICE = "balloon-agent.service"
RESTORE = "balloon-agent-restore.service"
UNIT = "/usr/local/lib/systemd/system/balloon-agent.service"
CONFIG = "/etc/balloon-agent.toml"
RULE = "/run/udev/rules.d/40-memory.rules"
SECURITY_THRESHOLD = 50  # tenths
# pip's packages, under emulation, on a crowded machine.
INSTALL_DEADLINE = 1200.0
# Of the checkout, to install it from.
PARTS = ("balloon_agent", "deploy", "udev", "pyproject.toml", "README.md", "LICENSE")
# What the guest writes by itself. (Of /proc, /sys, /dev and /run nothing is on its disk.)
APART = (
    "/tmp",  # whatever is there goes with each boot
    "/var/tmp",  # of services with a /tmp of their own, cleared by age
    "/var/log",  # the journal, logins
    "/var/lib/systemd",  # random seed, timers, clock
    "/opt/source",  # what is installed from
)


@dataclass
class Guest:
    machine: VirtualMachine
    before: set[str]


def listing(machine: VirtualMachine) -> set[str]:
    """All files of the guest, with mode and owner, and unless they are folders, size, time and target."""
    apart = " -o ".join(f"-path {path}" for path in APART)
    return set(
        machine.shell(
            f"find / -xdev \\( {apart} \\) -prune -o -type d -printf '%p %M %U %G\\n' -o -printf '%p %M %U %G %s %T@ %l\\n'"
        ).splitlines()
    )


def source(folder: Path) -> Path:
    """This checkout, as it is, and all packages that it needs, as an archive that the guest has for a disk."""
    archive = folder / "source.tar"
    names = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PARTS],
        check=True,
        capture_output=True,
    ).stdout
    tar = ("tar", "--owner=0", "--group=0")
    files = ("--null", "--files-from=-", "--transform=s|^|checkout/|")
    subprocess.run([*tar, "-C", REPOSITORY, *files, "-cf", archive], input=names, check=True)
    subprocess.run([*tar, "-C", wheels(folder).parent, "-rf", archive, "wheels"], check=True)
    return archive


def boot(stage: Stage, name: str, archive: Path) -> VirtualMachine:
    """A Debian system with what is in the archive in /opt/source."""
    machine = stage.machine(
        name,
        lambda: VirtualMachine(
            memory_mib=MEMORY_MIB,
            cpus=2,
            devices=[PORT, f"{BALLOON_DEVICE},bus=port1"],
            qemu_options=[f"-drive file={archive},format=raw,if=virtio,readonly=on"],
            system=debian_system(),
        ),
    )
    machine.shell("mkdir /opt/source; tar -C /opt/source -xf /dev/vdb; systemctl is-system-running --wait")
    kernel_driver_works(machine)
    return machine


@pytest.fixture(scope="module")
def fresh(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Guest:
    """Booted, with nothing of ours but what is to be installed."""
    machine = boot(stage, "installed", source(tmp_path_factory.mktemp("install")))
    return Guest(machine, listing(machine))


@pytest.fixture(scope="module")
def installed(fresh: Guest) -> Guest:
    """After deploy/install, without a network, and a reboot."""
    machine = fresh.machine
    said = machine.shell("cd /opt/source && checkout/deploy/install --wheels wheels 2>&1", timeout=INSTALL_DEADLINE)
    assert "installed, and running" in said
    machine.reboot()
    up(machine)
    return fresh


@pytest.fixture(scope="module")
def removed(installed: Guest) -> Guest:
    """After deploy/uninstall, with memory in the balloon that the agent was told to keep there, and a reboot."""
    machine = installed.machine
    machine.shell(f"""printf 'on-stop = "keep"\\n' >{CONFIG}; systemctl reload {SERVICE}""")
    machine.set_balloon(SMALL_MIB)
    machine.wait_balloon(SMALL_MIB, 60)
    said = machine.shell("/opt/source/checkout/deploy/uninstall --purge 2>&1")
    assert said == "uninstall: removed\n"
    # Without a reboot, too, it is the kernel's driver that obeys now.
    machine.wait_balloon(SMALL_MIB, 60)
    assert driver_of_balloon(machine) == "virtio-pci"
    assert "offline" not in machine.shell("cat /sys/devices/system/memory/memory*/state")
    machine.reboot()
    return installed


def up(machine: VirtualMachine) -> None:
    """The service is, within a minute."""
    becomes(lambda: state(machine), "active")


def state(machine: VirtualMachine) -> str:
    return machine.run(["systemctl", "is-active", SERVICE]).out.strip()


def becomes(look: Callable[[], object], wanted: object, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while (now := look()) != wanted:
        assert time.monotonic() < deadline, now


def show(machine: VirtualMachine, name: str, unit: str = SERVICE) -> str:
    return machine.shell(f"systemctl show --value -p {name} {unit}").strip()


def journal(machine: VirtualMachine) -> str:
    return machine.shell(f"journalctl -b --no-pager -o cat -u {SERVICE}")


def held(machine: VirtualMachine) -> dict[str, int]:
    """Bytes by source, of those that have any, by what balloonctl says."""
    said = json.loads(machine.run(["balloonctl", "status", "--json"]).check().out)
    return {name: size for name, size in said["held_bytes"].items() if size}


def nothing_is_held(machine: VirtualMachine) -> None:
    assert "offline" not in machine.shell("cat /sys/devices/system/memory/memory*/state")
    assert machine.shell("ls /run/balloon-agent/state.json /run/balloon-agent/holders/* 2>/dev/null || true") == ""
    assert machine.shell("grep -lz balloon_agent.memory.[h]older /proc/[1-9]*/cmdline || true") == ""


def balloon(machine: VirtualMachine, guest_mib: int) -> None:
    machine.set_balloon(guest_mib)
    machine.wait_balloon(guest_mib, 60)


def test_after_a_reboot_the_service_has_the_device_and_all_that_it_needs(installed: Guest) -> None:
    machine = installed.machine
    assert driver_of_balloon(machine) == "uio_pci_generic"
    # The kernel's own driver was kept off from the beginning.
    assert "virtio_balloon" not in machine.shell("cat /proc/modules")
    assert machine.shell("systemctl --failed --no-legend") == ""
    said = journal(machine)
    assert "driving 0000:01:00.0 through uio_pci_generic by its cont queues" in said
    # Whatever the sandbox does not let it do, it warns of.
    for warning in ("looked for", "not noticed", "has to wait for its turn", "may choose this process", "NOT PINNED", "error"):
        assert warning not in said, said
    pid = show(machine, "MainPID")
    assert machine.shell(f"cat /proc/{pid}/oom_score_adj") == "-1000\n"
    niceness = machine.shell(f"cut -d ' ' -f 19 /proc/{pid}/stat")
    assert niceness == "-10\n"
    group = "/sys/fs/cgroup/system.slice/balloon-agent.service"
    # What systemd-oomd asks of a group of root's.
    script = f"import os; print(os.getxattr('{group}', 'user.oomd_omit'), os.stat('{group}').st_uid)"
    assert machine.shell(f'python3 -c "{script}"') == "b'1' 0\n"


def test_holders_have_what_makes_the_oom_killer_wait_for_their_memory(installed: Guest) -> None:
    """A second thread, an AIO context, and while they wait, real-time priority: field 41 in /proc/PID/stat."""
    pids = installed.machine.shell("grep -lz balloon_agent.memory.[h]older /proc/[1-9]*/cmdline | cut -d/ -f3").split()
    assert pids
    for pid in pids:
        becomes(lambda pid=pid: installed.machine.shell(f"cut -d' ' -f20,41 /proc/{pid}/stat").split(), ["2", "1"])  # type: ignore[misc]
        assert "[aio]" in installed.machine.shell(f"cat /proc/{pid}/maps")
        # And it is not swapped out before it could end.
        assert int(installed.machine.shell(f"grep VmLck /proc/{pid}/status").split()[1])


def test_the_host_is_obeyed_and_metrics_say_so(installed: Guest) -> None:
    machine = installed.machine
    balloon(machine, SMALL_MIB)
    now = scrape(machine)
    assert now["balloon_actual_bytes"] == HELD
    assert sum(value for name, value in now.items() if name.startswith("balloon_held_bytes{")) == HELD
    assert sum(held(machine).values()) == HELD
    # The status that systemctl shows comes a moment later.
    becomes(lambda: show(machine, "StatusText"), f"the balloon has {HELD >> 20} MiB")
    balloon(machine, MEMORY_MIB)


def test_commands_are_there_and_complete(installed: Guest) -> None:
    script = """
        for program in balloonctl balloon-agent; do . /usr/local/share/bash-completion/completions/$program; done
        COMP_WORDS=(balloonctl sta) COMP_CWORD=1; _shtab_balloonctl; echo ${COMPREPLY[*]}
        COMP_WORDS=(balloon-agent re) COMP_CWORD=1; _shtab_balloon_agent; echo ${COMPREPLY[*]}
    """
    machine = installed.machine
    assert set(machine.run(["bash", "-c", script]).check().out.split()) >= {"stats", "status", "restore"}
    assert machine.run(["balloon-agent", "--version"]).code == 0
    assert machine.shell("ls /usr/local/share/man/man1 /usr/local/share/man/man8").count("balloon") == 2


def test_a_reload_changes_options_all_or_none(installed: Guest) -> None:
    machine = installed.machine
    # Sources whose files the sandbox has to leave writable, apart from blocks and huge pages of the default.
    machine.shell(f"""printf 'sources = ["hugetlb", "pages"]\\nreserve = "32M"\\n' >{CONFIG}; systemctl reload {SERVICE}""")
    balloon(machine, SMALL_MIB)
    assert set(held(machine)) == {"hugetlb"}
    balloon(machine, MEMORY_MIB)
    machine.shell(f"echo 'reserve = \"lots\"' >{CONFIG}")
    assert machine.run(["systemctl", "reload", SERVICE]).code != 0
    assert "line 1, reserve" in journal(machine)
    assert state(machine) == "active"
    assert "reserve 64 MiB" not in journal(machine).rpartition("options are read anew")[2]
    machine.shell(f"cp /opt/source/checkout/deploy/balloon-agent.toml {CONFIG}; systemctl reload {SERVICE}")


def test_what_hides_in_programs_that_are_not_roots_is_found_in_the_sandbox(installed: Guest) -> None:
    machine = installed.machine
    user = machine.start(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", PUNCH], keep_stdin=True
    )
    user.wait_for("ready", 120)
    assert machine.run(["balloonctl", "set", "100%", "--timeout", "120"], timeout=180).code == 3
    said = json.loads(machine.run(["balloonctl", "status", "--json"]).check().out)
    assert said["hidden_freed_bytes_total"]["split"] >= 100 << 20, said
    assert "hidden" not in said["source_notes"], said
    user.close_stdin()
    user.wait(60).check()
    machine.run(["balloonctl", "follow"], timeout=120).check()
    balloon(machine, MEMORY_MIB)


def test_an_agent_that_is_killed_is_started_again_and_goes_on(installed: Guest) -> None:
    machine = installed.machine
    balloon(machine, SMALL_MIB)
    before = held(machine)
    killed = show(machine, "MainPID")
    # Where Yama lets nobody have the descriptors of processes that are not children, as in other distributions.
    machine.shell("echo 1 >/proc/sys/kernel/yama/ptrace_scope")
    machine.shell(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
    becomes(lambda: (show(machine, "NRestarts"), state(machine)), ("1", "active"))
    assert show(machine, "MainPID") != killed
    assert f"an earlier agent left {HELD >> 20} MiB in the balloon" in journal(machine)
    assert held(machine) == before
    balloon(machine, SMALL_MIB + 100)
    balloon(machine, MEMORY_MIB)
    assert held(machine) == {}


def test_systemd_and_udev_find_nothing_wrong(installed: Guest) -> None:
    machine = installed.machine
    # There is no man here to look pages up with.
    said = machine.run(["systemd-analyze", "verify", "--man=no", UNIT, f"{Path(UNIT).parent}/{RESTORE}"])
    assert (said.code, said.out, said.err) == (0, "", "")
    machine.run(["systemd-analyze", "security", "--no-pager", f"--threshold={SECURITY_THRESHOLD}", SERVICE, RESTORE]).check()
    (path,) = machine.shell("realpath /sys/bus/pci/devices/0000:01:00.0").split()
    tested = machine.run(["udevadm", "test", path]).check()
    said_of_rules = [line for line in (tested.out + tested.err).splitlines() if "60-balloon-agent.rules" in line]
    assert said_of_rules
    assert all("Reading rules file" in line for line in said_of_rules), said_of_rules
    assert "SYSTEMD_ALIAS=/sys/subsystem/balloon" in tested.out


def doctor(machine: VirtualMachine, check: str, *within: str) -> dict[str, str]:
    """What doctor says of this, under the command ``within``."""
    findings = json.loads(machine.run([*within, "balloon-agent", "doctor", "--json"]).out)
    return next(finding for finding in findings if finding["check"] == check)


def udev_rules(machine: VirtualMachine) -> dict[str, str]:
    return doctor(machine, "udev-rules")


def test_anybody_is_told_which_service_drives_the_balloon(installed: Guest) -> None:
    machine = installed.machine
    somebody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    drives = f"uio_pci_generic, for the agent that runs, process {show(machine, 'MainPID')}"
    assert doctor(machine, "driver", *somebody)["found"] == drives


def test_doctor_names_the_rule_that_brings_a_block_online_and_no_other(installed: Guest) -> None:
    """Debian's own rules are there, too."""
    machine = installed.machine
    assert udev_rules(machine)["level"] == "ok"
    # One that has something pinned in it would be tried for ever.
    taken = machine.shell(
        "for block in $(ls -dvr /sys/devices/system/memory/memory*); do"
        ' timeout -s KILL 10 sh -c "echo offline >$block/state" 2>/dev/null && echo $block && break; done'
    ).strip()
    trigger = "udevadm control --reload; udevadm trigger --action=change --subsystem-match=memory --settle"
    machine.shell(f'mkdir -p {Path(RULE).parent}; echo \'SUBSYSTEM=="block", ATTR{{state}}="online"\' >{RULE}; {trigger}')
    assert udev_rules(machine)["level"] == "ok"
    assert machine.shell(f"cat {taken}/state") == "offline\n"
    machine.shell(f'echo \'SUBSYSTEM=="memory", ATTR{{state}}="online"\' >{RULE}; {trigger}')
    assert udev_rules(machine)["level"] == "warn"
    assert f"{RULE}, line 1, brings memory blocks online" in udev_rules(machine)["found"]
    assert machine.shell(f"cat {taken}/state") == "online\n"
    machine.shell(f"rm {RULE}; udevadm control --reload")


@pytest.mark.parametrize(("path", "is_open"), [("/dev/vfio/vfio", True), ("/dev/mem", False), ("/dev/vda", False)])
def test_the_service_may_have_what_vfio_needs_and_no_other_device(installed: Guest, path: str, is_open: bool) -> None:
    """That it may have /dev/uioN is seen above."""
    machine = installed.machine
    machine.shell(f"modprobe vfio-pci; test -c {path} -o -b {path}")
    script = f"echo $$ >/sys/fs/cgroup$(systemctl show --value -p ControlGroup {SERVICE})/cgroup.procs && exec 3<>{path}"
    tried = machine.run(["/bin/sh", "-c", script])
    assert (tried.code == 0) == is_open, tried
    assert is_open or "Operation not permitted" in tried.err, tried


def test_stopped_it_stays_so_until_a_balloon_is_plugged_in(installed: Guest) -> None:
    machine = installed.machine
    machine.shell(f"systemctl stop {SERVICE}")
    kernel_driver_works(machine)
    assert state(machine) == "inactive"
    unplug(machine)
    plug(machine, cont_pages=True)
    up(machine)
    assert driver_of_balloon(machine) == "uio_pci_generic"
    balloon(machine, SMALL_MIB)
    balloon(machine, MEMORY_MIB)


def test_a_service_that_cannot_run_any_more_gives_back_what_is_held(installed: Guest) -> None:
    machine = installed.machine
    balloon(machine, SMALL_MIB)
    before = held(machine)
    assert before.get("blocks")
    # While an agent runs, nothing is given back behind its back.
    machine.shell(f"systemctl start {RESTORE}")
    assert held(machine) == before
    machine.shell(f"echo 'reserve = \"lots\"' >{CONFIG}")
    # Nor is one stopped for a version that would not start.
    pid = show(machine, "MainPID")
    refused = machine.run(["/opt/source/checkout/deploy/install", "--wheels", "/opt/source/wheels"], timeout=INSTALL_DEADLINE)
    assert refused.code == 1
    assert f"{CONFIG}, line 1, reserve" in refused.err
    assert (state(machine), show(machine, "MainPID")) == ("active", pid)

    machine.shell(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
    becomes(lambda: state(machine), "failed", 300)
    becomes(lambda: driver_of_balloon(machine), "virtio-pci", 300)
    becomes(lambda: show(machine, "ActiveState", RESTORE), "inactive", 300)
    assert show(machine, "Result", RESTORE) == "success"
    nothing_is_held(machine)
    # The host is obeyed, by the kernel's driver.
    machine.wait_balloon(SMALL_MIB, 60)

    machine.shell(f"cp /opt/source/checkout/deploy/balloon-agent.toml {CONFIG}")
    machine.shell(f"systemctl reset-failed {SERVICE}; systemctl start {SERVICE}")
    machine.wait_balloon(SMALL_MIB, 60)
    assert held(machine) == before
    balloon(machine, MEMORY_MIB)


def test_an_agent_that_finds_no_balloon_gives_back_what_was_held_for_one(installed: Guest) -> None:
    machine = installed.machine
    machine.shell(f"""printf 'on-stop = "keep"\\n' >{CONFIG}; systemctl reload {SERVICE}""")
    balloon(machine, SMALL_MIB)
    machine.shell(f"systemctl stop {SERVICE}; cp /opt/source/checkout/deploy/balloon-agent.toml {CONFIG}")
    assert "offline" in machine.shell("cat /sys/devices/system/memory/memory*/state")
    unplug(machine)
    said = machine.run(["balloon-agent", "run"])
    assert said.code == 1
    assert "what an earlier agent has held is the guest's again" in said.err
    nothing_is_held(machine)
    plug(machine, cont_pages=True)
    up(machine)


@pytest.mark.parametrize(("off", "on"), [("disable", "enable"), ("mask", "unmask")])
def test_one_that_is_not_to_run_leaves_the_balloon_to_the_kernel(installed: Guest, off: str, on: str) -> None:
    machine = installed.machine
    machine.shell(f"systemctl {off} --now --quiet {SERVICE}; rmmod virtio_balloon")
    # As at boot.
    machine.shell("udevadm trigger --action=add --settle")
    kernel_driver_works(machine)
    assert state(machine) == "inactive"
    machine.shell(f"systemctl {on} --quiet {SERVICE}; systemctl start {SERVICE}")
    assert driver_of_balloon(machine) == "uio_pci_generic"


def test_installing_it_again_changes_nothing(installed: Guest) -> None:
    machine = installed.machine
    before, pid = listing(machine), show(machine, "MainPID")
    machine.shell("cd /opt/source && checkout/deploy/install --wheels wheels", timeout=INSTALL_DEADLINE)
    assert listing(machine) ^ before == set()
    # What has not changed need not be started again.
    assert show(machine, "MainPID") == pid


def test_uninstalled_it_leaves_no_trace(removed: Guest) -> None:
    assert listing(removed.machine) ^ removed.before == set()
    assert "uio" not in removed.machine.shell("cat /proc/modules")


def test_the_kernel_has_the_balloon_again(removed: Guest) -> None:
    machine = removed.machine
    # What the host asked for before the reboot, and then something else.
    machine.wait_balloon(SMALL_MIB, 60)
    kernel_driver_works(machine)
    assert address_of_balloon(machine) == "0000:01:00.0"
    assert machine.run(["systemctl", "cat", SERVICE]).code != 0
