"""``balloon-agent doctor`` over trees that look like a guest's: one that is well, and each way in which it can be ill."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from balloon_agent.doctor.capability import Capability
from balloon_agent.doctor.doctor import (
    CHECKS,
    as_json,
    as_text,
    examine,
    exit_code,
    name_of,
)
from balloon_agent.doctor.machine import (
    Finding,
    Level,
    Machine,
    Trials,
)
from balloon_agent.errors import Obstacle
from balloon_agent.guest.shared_sysctls import Changed
from balloon_agent.linux.pagemap import obstacle_to_translating
from balloon_agent.options import Options
from balloon_agent.takeover.lock import (
    Lock,
    device_lock,
    run_dir_lock,
    who_locks,
)
from balloon_agent.takeover.state import StateFile

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
ADDRESS = "0000:00:05.0"
DEVICE = f"sys/devices/pci0000:00/{ADDRESS}"
MODULES = "lib/modules/6.1.0-9-amd64"
GROUP = "sys/fs/cgroup/system.slice/balloon-agent.service"
THP = "sys/kernel/mm/transparent_hugepage"
FINE = Trials(
    pin=lambda: None,
    translate=lambda: None,
    hear=lambda: None,
    stalls=lambda: None,
    omits=lambda group: True,
    machine=lambda: ("x86_64", 4096, 1 << 30),
)
# Mostly as Debian 12 has it.
FILES = {
    "proc/sys/kernel/osrelease": "6.1.0-9-amd64",
    "proc/sys/kernel/io_uring_disabled": "0",
    "proc/sys/kernel/perf_event_paranoid": "3",
    "proc/sys/kernel/yama/ptrace_scope": "0",
    "proc/sys/kernel/modules_disabled": "0",
    "proc/sys/vm/compact_unevictable_allowed": "1",
    "proc/sys/vm/overcommit_memory": "0",
    "proc/sys/vm/panic_on_oom": "0",
    "proc/sys/vm/oom_kill_allocating_task": "0",
    "proc/self/status": "Name:\tpython3\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n",
    "proc/self/limits": "Max open files  1024  4096  files\nMax locked memory  65536  65536  bytes\n",
    "proc/self/cgroup": "0::/user.slice\n",
    "proc/self/net/tcp": "  sl  local_address rem_address   st\n   0: 0100007F:0016 00000000:0000 0A 0\n",
    "proc/self/net/tcp6": "",
    "proc/locks": "",
    "proc/swaps": "Filename Type Size Used Priority\n",
    "proc/meminfo": "MemTotal:  1048576 kB\nMemFree:  4 kB\n",
    "proc/pressure/memory": "some",
    "sys/kernel/security/lockdown": "[none] integrity confidentiality",
    "sys/kernel/tracing/events/vmscan/mm_vmscan_wakeup_kswapd/id": "1",
    "sys/kernel/tracing/events/vmscan/mm_vmscan_direct_reclaim_begin/id": "2",
    f"{THP}/enabled": "always [madvise] never",
    "sys/kernel/debug/split_huge_pages": "",
    f"{THP}/defrag": "always defer defer+madvise [madvise] never",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "3",
    "sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages": "0",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "2",
    "sys/devices/system/memory/block_size_bytes": "8000000",
    "sys/devices/system/memory/auto_online_blocks": "offline",
    "sys/devices/system/memory/memory0/valid_zones": "none",
    "sys/devices/system/memory/memory1/valid_zones": "DMA32",
    "sys/devices/system/memory/memory2/valid_zones": "Normal",
    "usr/lib/udev/rules.d/40-a.rules": 'SUBSYSTEM=="block", ATTR{state}="online", RUN+="/bin/on"',
    "sys/power/state": "freeze mem disk",
    "sys/power/resume": "0:0",
    "sys/fs/cgroup/cgroup.controllers": "memory pids",
    f"{GROUP}/memory.max": "max",
    f"{GROUP}/memory.high": "max",
    f"{GROUP}/memory.oom.group": "0",
    f"{GROUP}/pids.max": "1000",
    f"{MODULES}/modules.dep": "kernel/drivers/uio/uio_pci_generic.ko.xz: kernel/drivers/uio/uio.ko.xz\n",
    f"{MODULES}/modules.builtin": "kernel/drivers/vfio/pci/vfio-pci.ko\n",
    f"{DEVICE}/vendor": "0x1af4",
    f"{DEVICE}/device": "0x1045",
    f"{DEVICE}/class": "0x00ff00",
}
STATS, OOM, CONT, REPORTING, VERSION_1, PLATFORM = 1, 2, 6, 5, 32, 33


class Tree:
    """A guest: its files, with what an agent in it is told, and what can be tried there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.options = Options(run_dir=root / "run/balloon-agent")
        self.trials = FINE
        self.problem: str | None = None
        for name, text in FILES.items():
            self.write(name, text)
        for driver in ("virtio-pci", "uio_pci_generic", "vfio-pci", "pci-stub", "pcieport"):
            (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True)
        (root / "sys/bus/pci/devices").mkdir()
        (root / "sys/bus/pci/devices" / ADDRESS).symlink_to(root / DEVICE)
        self.pin(1)
        self.bind("virtio-pci")
        self.options.run_dir.mkdir(parents=True)

    def write(self, name: str, text: str) -> Self:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        return self

    def remove(self, name: str) -> Self:
        path = self.root / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return self

    def rules(self, text: str, folder: str = "usr/lib") -> Self:
        """A file of udev's rules, of the same name in whichever folder."""
        return self.write(f"{folder}/udev/rules.d/40-a.rules", text)

    def pin(self, number: int) -> Self:
        (self.root / DEVICE / "config").write_bytes(struct.pack("<HH57xBxx", 0x1AF4, 0x1045, number))
        return self

    def bind(self, driver: str | None, *bits: int) -> Self:
        """The function's driver, and the feature bits that the kernel's shows."""
        for name in ("driver", "virtio3"):
            if (self.root / DEVICE / name).exists():
                self.remove(f"{DEVICE}/{name}")
        if driver is not None:
            (self.root / DEVICE / "driver").symlink_to(self.root / "sys/bus/pci/drivers" / driver)
        if driver == "virtio-pci":
            self.features(*(bits or (STATS, OOM, REPORTING, VERSION_1)))
            kernels = self.root / "sys/bus/virtio/drivers/virtio_balloon"
            kernels.mkdir(parents=True, exist_ok=True)
            (self.root / DEVICE / "virtio3/driver").symlink_to(kernels)
        return self

    def features(self, *bits: int) -> Self:
        self.write(f"{DEVICE}/virtio3/features", "".join("1" if bit in bits else "0" for bit in range(64)))
        return self

    def user(self, number: int) -> Self:
        self.write("proc/self/status", f"Uid:\t{number}\t{number}\t{number}\nCapEff:\t0000000000000000")
        return self

    def lack(self, *capabilities: Capability) -> Self:
        left = (1 << 41) - 1 & ~sum(1 << which for which in capabilities)
        self.write("proc/self/status", f"Uid:\t0\t0\t0\nCapEff:\t{left:016x}")
        return self

    def limit(self, name: str, value: object) -> Self:
        self.write("proc/self/limits", f"{name}  {value}  {value}  units")
        return self

    def set(self, **changes: Any) -> Self:
        self.options = replace(self.options, **changes)
        return self

    def obstacle(self, *remedy: str, **named: str) -> Self:
        found: dict[str, Any] = {name: partial(Obstacle, text, *remedy) for name, text in named.items()}
        self.trials = replace(self.trials, **found)
        return self

    def oomd(self, *, omits: bool = True) -> Self:
        """systemd-oomd runs; whether it passes groups over."""
        self.trials = replace(self.trials, omits=lambda group: omits)
        return self.write("sys/fs/cgroup/system.slice/systemd-oomd.service/cgroup.procs", "417")

    def of_kind(self, *kind: Any) -> Self:
        self.trials = replace(self.trials, machine=lambda: kind)
        return self

    def group(self, *others: tuple[str, str], kind: str = "DMA-FQ") -> Self:
        """An IOMMU group with other functions, each with its driver."""
        folder = self.root / "sys/kernel/iommu_groups/7"
        (folder / "devices").mkdir(parents=True)
        (folder / "type").write_text(f"{kind}\n")
        (folder / "devices" / ADDRESS).symlink_to(self.root / DEVICE)
        for address, which in others:
            (self.root / "sys/devices/pci0000:00" / address).mkdir()
            (self.root / "sys/devices/pci0000:00" / address / "driver").symlink_to(self.root / "sys/bus/pci/drivers" / which)
            (folder / "devices" / address).symlink_to(self.root / "sys/devices/pci0000:00" / address)
        (self.root / DEVICE / "iommu_group").symlink_to(folder)
        return self

    def agent(self, *, device: bool = True, run_dir: bool = True) -> None:
        """Locks of another process's, as /proc/locks shows them."""
        paths = [device_lock(ADDRESS, self.root / "run/balloon-agent-locks")] if device else []
        paths += [run_dir_lock(self.options.run_dir)] if run_dir else []
        lines = []
        for number, path in enumerate(paths, 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            found = path.stat()
            where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
            # One waits for it; the other lock is somebody else's, of another kind.
            lines += [
                f"{number}: -> FLOCK  ADVISORY  WRITE 4712 {where} 0 EOF",
                f"9: POSIX  ADVISORY  WRITE 4713 {where} 0 EOF",
            ]
            lines += [f"{number}: FLOCK  ADVISORY  WRITE 4711 {where} 0 EOF"]
        self.write("proc/locks", "\n".join(lines))
        for name in ("status", "limits", "cgroup"):
            self.write(f"proc/4711/{name}", (self.root / "proc/self" / name).read_text())

    def examine(self) -> dict[str, Finding]:
        return examine(Machine(self.options, self.root, self.trials, self.problem))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def snapshot(root: Path) -> dict[str, object]:
    """All there is below, with content and times of change."""
    return {
        str(path): (path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes(), path.lstat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


def test_in_a_guest_that_is_well_all_is_well_and_stays_as_it_is(tree: Tree) -> None:
    before = snapshot(tree.root)
    findings = tree.examine()
    assert {name: finding for name, finding in findings.items() if finding.level is not OK} == {}
    assert exit_code(findings) == 0
    assert snapshot(tree.root) == before
    # shrink_underused is not there.
    assert {name_of(check) for check in CHECKS} - findings.keys() == {"thp-shrinking"}


def by_hand(tree: Tree) -> None:
    """An agent runs, and is no service."""
    tree.remove(GROUP).write("proc/self/cgroup", "0::/user.slice").agent()


ONLINES = 'SUBSYSTEM=="memory", ACTION=="add", ATTR{state}="online"\n'
BRINGS, NONE = (
    (WARN, "^/usr/lib/udev/rules.d/40-a.rules, line 1, brings", "in a copy in /etc/udev/rules.d.*memhp"),
    (OK, "none brings", ""),
)
# Rules, and what is said of them.
RULES: list[tuple[str, tuple[Level, str, str]]] = [
    (ONLINES, BRINGS),
    ('SUBSYSTEM=="memory", ACTION=="add|change", TEST=="state", ATTR{state}!="online", ATTR{state}="online_movable"', BRINGS),
    ('DEVPATH=="/devices/system/memory/memory[0-9]*", ATTR{state}=="offline", ATTR{online} = "1"', BRINGS),
    ('SUBSYSTEM=="memory", \\\n# no part of it\n  ATTR{state}:="online"', BRINGS),
    (
        'SUBSYSTEM=="memory", ACTION=="change", RUN+="/bin/on %k"',
        (WARN, "line 1, runs /bin/on for memory blocks, which may", "copy"),
    ),
    # Not of blocks that are offline, not at these events, not of memory, not online; or no rule at all.
    ('SUBSYSTEM=="memory", ATTR{state}=="online", ATTR{state}="online"', NONE),
    ('SUBSYSTEM=="memory", ACTION=="online|offline", RUN+="/bin/kdump"', NONE),
    ('SUBSYSTEM=="cpu", ACTION=="add", ATTR{online}="1", RUN+="/bin/cpu"', NONE),
    ('SUBSYSTEM=="memory", ACTION=="remove", ATTR{state}="online"', NONE),
    ('SUBSYSTEM=="memory", ATTR{state}="offline"', NONE),
    ('ACTION=="add", RUN+="/bin/all", RUN{builtin}+="kmod load"', NONE),
    (f"#{ONLINES}", NONE),
    ("what is \\", NONE),
    # Red Hat's way: the condition comes before, and decides what follows.
    (
        'SUBSYSTEM!="memory", ACTION!="add", GOTO="end"\nPROGRAM="/bin/arch", RESULT=="s390*", GOTO="end"\n'
        'ENV{.to}="online"\nATTR{state}=="offline", ATTR{state}="$env{.to}"\nLABEL="end"\n',
        (WARN, "rules, line 4, brings memory blocks online: also", "copy"),
    ),
    ('SUBSYSTEM!="memory", GOTO="end"\nRUN+="/bin/on"\nLABEL="end"', (WARN, "line 2, runs /bin/on", "copy")),
    (f'SUBSYSTEM=="*", GOTO="end"\n{ONLINES}LABEL="end"', NONE),
    (f'SUBSYSTEM=="*", GOTO="end"\nLABEL="end"\n{ONLINES}', (WARN, "line 3", "copy")),
    (f'SUBSYSTEM=="memory", ACTION=="online", GOTO="end"\nGOTO="other"\nLABEL="end"\n{ONLINES}LABEL="other"', NONE),
]
# A change of the tree; the check that notices; its level, and words of what it finds and of the remedy.
Change = Callable[[Tree], object]
CASES: list[tuple[str, Change, Level, str, str]] = [
    ("user", lambda t: t.user(1000), WARN, "not root", "root"),
    ("kernel", lambda t: t.write("proc/sys/kernel/osrelease", "5.13.19"), FAIL, "5.13.19 is older than 5.14", "later kernel"),
    ("kernel", lambda t: t.write("proc/sys/kernel/osrelease", "strange"), WARN, "strange", "5.14"),
    ("kernel", lambda t: t.write("proc/sys/kernel/osrelease", "5.14.0"), OK, "Linux 5.14.0", ""),
    ("supported", lambda t: t.of_kind("aarch64", 4096, 1 << 30), FAIL, "is aarch64", "kernel's own driver"),
    ("supported", lambda t: t.of_kind("x86_64", 65536, 1 << 30), FAIL, "pages of 65536 bytes", "4 KiB"),
    ("supported", lambda t: t.of_kind("x86_64", 4096, 17 << 40), FAIL, "to 17825792 MiB, beyond 16777216 MiB", "less"),
    ("supported", lambda t: t.of_kind("x86_64", 4096, 16 << 40), OK, "x86_64", ""),
    ("options", lambda t: setattr(t, "problem", "a.toml, line 3: no such option"), FAIL, "line 3", "--help"),
    ("device", lambda t: t.remove(f"sys/bus/pci/devices/{ADDRESS}"), FAIL, "no virtio balloon", "-device virtio-balloon-pci"),
    ("device", lambda t: t.set(device="00:09.0"), FAIL, f"no PCI function 0000:00:09.0 .*{ADDRESS}", "--device ADDRESS"),
    ("device", lambda t: t.set(device="00:05.0"), OK, ADDRESS, ""),
    ("features", lambda t: t.bind("virtio-pci", STATS), WARN, "driver knows: STATS_VQ; whether CONT", "free-page-reporting=on"),
    ("features", lambda t: t.bind(None), WARN, "not known", "start the agent"),
    (
        "features",
        lambda t: t.write("sys/kernel/debug/virtio/virtio3/device_features", "1\n6\n32"),
        OK,
        "^offered: STATS_VQ, CONT_PAGES$",
        "",
    ),
    ("features", lambda t: t.write("sys/kernel/debug/virtio/virtio3/device_features", "1"), WARN, "frame by frame", "QEMU 5.1"),
    ("deflate-on-oom", lambda t: t.bind("virtio-pci", STATS), WARN, "not offered", "deflate-on-oom=on"),
    (
        "deflate-on-oom",
        lambda t: (t.bind("virtio-pci", STATS), t.set(relief_below_target="always")),
        OK,
        "not offered, and relief-below-target is always",
        "",
    ),
    ("driver", lambda t: t.bind(None), WARN, "has no driver", "balloon-agent unbind gives it"),
    ("driver", lambda t: t.bind("uio_pci_generic"), WARN, "with uio_pci_generic, and no agent", "balloon-agent restore"),
    ("driver", lambda t: t.bind("pci-stub"), FAIL, "bound to pci-stub", f"echo {ADDRESS} >/.*/driver/unbind"),
    ("driver", lambda t: t.bind("vfio-pci"), WARN, "with vfio-pci, and no agent", "balloon-agent restore"),
    ("driver", lambda t: t.remove(f"{DEVICE}/virtio3/driver"), OK, "virtio-pci, with no driver below", ""),
    ("interrupt-pin", lambda t: t.pin(0), FAIL, "0x3d is 0", "INTx"),
    ("interrupt-pin", lambda t: t.pin(4), OK, "INTD", ""),
    ("iommu", lambda t: t.group(("0000:00:04.0", "pcieport")), OK, "group 7: vfio-pci it is", ""),
    ("iommu", lambda t: t.group(("0000:00:04.0", "ahci")), WARN, "group 7 has others in use: 0000:00:04.0 .ahci.", "own"),
    ("iommu", lambda t: (t.group(), t.features(STATS, PLATFORM)), OK, "group 7: vfio-pci it is", ""),
    (
        "iommu",
        lambda t: (t.group(("0000:00:04.0", "ahci")), t.features(STATS, PLATFORM)),
        FAIL,
        "translates",
        "iommu=pt",
    ),
    (
        "iommu",
        lambda t: (t.group(), t.set(driver="uio_pci_generic"), t.features(STATS, PLATFORM)),
        FAIL,
        "group 7; it translates",
        "iommu=pt",
    ),
    (
        "iommu",
        lambda t: (t.group(kind="identity"), t.set(driver="uio_pci_generic"), t.features(PLATFORM)),
        OK,
        "what the options say",
        "",
    ),
    ("iommu", lambda t: t.set(driver="vfio-pci"), FAIL, "none, which vfio-pci needs", "--driver auto"),
    ("iommu", lambda t: t.set(vfio_noiommu=True), WARN, "can write anywhere", "give the VM an IOMMU"),
    (
        "lockdown",
        lambda t: (t.group(), t.write("sys/kernel/security/lockdown", "none [integrity] confidentiality")),
        OK,
        "integrity: only vfio-pci",
        "",
    ),
    ("module", lambda t: t.set(driver="vfio-pci"), FAIL, "no driver that the agent could have", "see iommu and lockdown"),
    ("module", lambda t: t.group(), OK, "vfio-pci is there", ""),
    (
        "lockdown",
        lambda t: t.write("sys/kernel/security/lockdown", "none [integrity] confidentiality"),
        FAIL,
        "integrity",
        "secure boot",
    ),
    ("lockdown", lambda t: t.remove("sys/kernel/security"), OK, "none that this kernel tells of", ""),
    (
        "module",
        lambda t: t.remove("sys/bus/pci/drivers/uio_pci_generic"),
        OK,
        "uio_pci_generic can be loaded",
        "",
    ),
    (
        "module",
        lambda t: (t.remove("sys/bus/pci/drivers/uio_pci_generic"), t.write(f"{MODULES}/modules.dep", "kernel/uio.ko.xz:")),
        FAIL,
        "6.1.0-9-amd64 has no uio_pci_generic",
        "full module package",
    ),
    (
        "module",
        lambda t: (t.remove("sys/bus/pci/drivers/uio_pci_generic"), t.write("proc/sys/kernel/modules_disabled", "1")),
        FAIL,
        "modules_disabled forbids",
        "modules-load.d",
    ),
    (
        "module",
        lambda t: (
            t.remove("sys/bus/pci/drivers/uio_pci_generic"),
            t.write("etc/modprobe.d/hard.conf", "# no\ninstall uio-pci-generic /bin/false"),
        ),
        FAIL,
        "/etc/modprobe.d/hard.conf keeps",
        "remove its line from /etc/modprobe.d/hard.conf",
    ),
    (
        "module",
        lambda t: (t.remove("sys/bus/pci/drivers/uio_pci_generic"), t.remove("lib")),
        WARN,
        "no /lib/modules/6.1.0-9-amd64",
        "modprobe -n",
    ),
    (
        "io-uring",
        lambda t: (t.obstacle(pin="no"), t.write("proc/sys/kernel/io_uring_disabled", "2")),
        WARN,
        r"cannot be pinned.*\(kernel.io_uring_disabled is 2\); only whole",
        "sysctl kernel.io_uring_disabled=0",
    ),
    ("io-uring", lambda t: t.obstacle(pin="no"), WARN, "cannot be pinned", "seccomp"),
    ("io-uring", lambda t: (t.obstacle(pin="no"), t.set(sources=("thp",))), FAIL, "cannot be pinned", "add `blocks`"),
    ("io-uring", lambda t: t.remove("proc/sys/kernel/io_uring_disabled"), OK, "^memory can be pinned$", ""),
    (
        "pagemap",
        lambda t: t.obstacle("run as root", translate="pagemap shows frame number 0"),
        FAIL,
        "frame number 0$",
        "CAP_SYS_ADMIN",
    ),
    ("pagemap", lambda t: (t.obstacle(translate="no"), t.user(1000)), WARN, "cannot be seen: no", "^run this as root$"),
    ("ptrace", lambda t: t.remove("proc/sys/kernel/yama"), OK, "unrestricted", ""),
    ("ptrace", lambda t: t.write("proc/sys/kernel/yama/ptrace_scope", "2"), OK, "is 2: the pins", ""),
    ("ptrace", lambda t: t.write("proc/sys/kernel/yama/ptrace_scope", "3"), FAIL, "is 3", "2 or less"),
    (
        "ptrace",
        lambda t: (t.write("proc/sys/kernel/yama/ptrace_scope", "1"), t.lack(Capability.SYS_PTRACE)),
        WARN,
        "is 1: without CAP_SYS_PTRACE",
        "CAP_SYS_PTRACE",
    ),
    (
        "ptrace",
        lambda t: (t.write("proc/sys/kernel/yama/ptrace_scope", "2"), t.lack(Capability.SYS_PTRACE)),
        FAIL,
        "is 2",
        "CAP_SYS_PTRACE",
    ),
    ("capabilities", lambda t: t.lack(Capability.SYS_ADMIN), FAIL, "lacks CAP_SYS_ADMIN", "CapabilityBoundingSet"),
    (
        "capabilities",
        lambda t: t.lack(Capability.SYS_NICE, Capability.SYS_RESOURCE),
        WARN,
        "CAP_SYS_RESOURCE .*CAP_SYS_NICE",
        "give",
    ),
    ("capabilities", lambda t: t.lack(Capability.SYS_MODULE, Capability.CHOWN), OK, "all that it needs", ""),
    (
        "capabilities",
        lambda t: (
            t.lack(Capability.SYS_MODULE, Capability.CHOWN),
            t.remove("sys/bus/pci/drivers/uio_pci_generic"),
            t.remove("sys/bus/pci/drivers/vfio-pci"),
            t.set(control_group="adm"),
        ),
        WARN,
        "CAP_CHOWN .*CAP_SYS_MODULE",
        "give",
    ),
    ("capabilities", lambda t: t.user(1000), WARN, "CAP_SYS_ADMIN", "run this as root"),
    ("locked-memory", lambda t: t.lack(Capability.IPC_LOCK), FAIL, "pin 65536 bytes", "LimitMEMLOCK=infinity"),
    (
        "locked-memory",
        lambda t: (t.lack(Capability.IPC_LOCK), t.limit("Max locked memory", "unlimited")),
        OK,
        "unlimited",
        "",
    ),
    ("open-files", lambda t: t.limit("Max open files", 1023), FAIL, "1023 files", "LimitNOFILE"),
    ("open-files", lambda t: t.limit("Max open files", 1024), OK, "1024", ""),
    ("open-files", lambda t: t.limit("Max open files", "unlimited"), OK, "any number", ""),
    (
        "control-group",
        lambda t: t.write(f"{GROUP}/memory.max", f"{1 << 29}"),
        FAIL,
        "service/memory.max is 512 MiB",
        "MemoryMax=",
    ),
    ("control-group", lambda t: t.write(f"{GROUP}/memory.max", f"{1 << 30}"), OK, "no limits that matter", ""),
    ("control-group", lambda t: t.write(f"{GROUP}/memory.high", f"{1 << 29}"), FAIL, "memory.high is 512 MiB", "MemoryHigh="),
    (
        "control-group",
        lambda t: t.write("sys/fs/cgroup/system.slice/memory.max", f"{1 << 28}"),
        FAIL,
        "^/sys/fs/cgroup/system.slice/memory.max is 256 MiB",
        "MemoryMax=",
    ),
    ("control-group", lambda t: t.write(f"{GROUP}/pids.max", "20"), WARN, "pids.max is 20", "TasksMax="),
    ("control-group", lambda t: t.write(f"{GROUP}/memory.oom.group", "1"), WARN, "takes the agent with", "OOMPolicy=continue"),
    (
        "control-group",
        lambda t: (t.remove(GROUP), t.write("sys/fs/cgroup/user.slice/memory.max", "4096")),
        FAIL,
        "^/sys/fs/cgroup/user.slice/memory.max",
        "MemoryMax=",
    ),
    (
        "control-group",
        lambda t: (t.remove(GROUP), t.remove("sys/fs/cgroup/cgroup.controllers")),
        WARN,
        "not known: there is no cgroup2",
        "unified",
    ),
    (
        "memory-blocks",
        lambda t: None,
        OK,
        r"of 3 blocks of 128 MiB 2 could be tried \(1 in DMA32, 1 in Normal\); new ones go offline",
        "",
    ),
    ("memory-blocks", lambda t: t.remove("sys/devices/system/memory"), WARN, "no memory blocks", "CONFIG_MEMORY_HOT"),
    (
        "memory-blocks",
        lambda t: (t.remove("sys/devices/system/memory"), t.set(sources=("blocks",))),
        FAIL,
        "no memory blocks",
        "other sources",
    ),
    (
        "memory-blocks",
        lambda t: (t.remove("sys/devices/system/memory"), t.set(sources=("thp",))),
        OK,
        "not among the sources",
        "",
    ),
    (
        "memory-blocks",
        lambda t: [t.write(f"sys/devices/system/memory/memory{n}/valid_zones", "none") for n in (1, 2)],
        WARN,
        "of 3 blocks of 128 MiB none",
        "HOTREMOVE",
    ),
    (
        "movable-zone",
        lambda t: t.write("sys/devices/system/memory/memory2/valid_zones", "Movable"),
        OK,
        "1 blocks are in it",
        "",
    ),
    (
        "movable-zone",
        lambda t: (t.write("sys/devices/system/memory/memory2/valid_zones", "Movable"), t.set(sources=("hugetlb",))),
        WARN,
        "1 blocks are in ZONE_MOVABLE",
        "movablecore=",
    ),
    ("hugepages", lambda t: None, OK, r"^2 MiB: 3 \(2 free\)$", ""),
    ("hugepages", lambda t: t.remove("sys/kernel/mm/hugepages"), OK, "no hugetlbfs", ""),
    ("hugepages", lambda t: t.set(sources=("hugetlb-1g", "hugetlb")), WARN, "size of hugetlb-1g$", "pdpe1gb"),
    (
        "thp-enabled",
        lambda t: t.write(f"{THP}/enabled", "always madvise [never]"),
        WARN,
        "never",
        "echo madvise >/sys/.*/enabled",
    ),
    ("thp-enabled", lambda t: t.remove(f"{THP}/enabled"), WARN, "no transparent huge pages", "CONFIG_TRANSPARENT"),
    (
        "thp-defrag",
        lambda t: t.write(f"{THP}/defrag", "always [defer] madvise never"),
        WARN,
        "defer",
        "echo madvise >/sys/.*/defrag",
    ),
    ("thp-defrag", lambda t: t.write(f"{THP}/defrag", "[defer+madvise] never"), OK, "defer.madvise", ""),
    ("thp-shrinking", lambda t: t.write(f"{THP}/shrink_underused", "1"), WARN, "zeros", "echo 0 >/sys/.*/shrink_underused"),
    ("thp-shrinking", lambda t: t.write(f"{THP}/shrink_underused", "0"), OK, "off", ""),
    ("hidden-memory", lambda t: None, OK, "can be split", ""),
    ("hidden-memory", lambda t: t.remove("sys/kernel/debug"), WARN, "No such file.*stays hidden", "mount -t debugfs"),
    (
        "hidden-memory",
        lambda t: t.remove("sys/kernel/debug").write("sys/fs/cgroup/memory.reclaim", ""),
        WARN,
        "No such file.*by reclaim, which evicts",
        "mount -t debugfs",
    ),
    ("compaction", lambda t: t.obstacle(pin="no"), OK, "allowed is 1", ""),
    (
        "compaction",
        lambda t: (t.obstacle(pin="no"), t.set(allow_unpinned=True)),
        WARN,
        "nothing is pinned",
        "compact_unevictable_allowed=0",
    ),
    ("overcommit", lambda t: t.write("proc/sys/vm/overcommit_memory", "2"), WARN, "is 2", "overcommit_memory=0"),
    ("overcommit", lambda t: t.set(overcommit=False), WARN, "large mappings are refused", "overcommit = false"),
    ("overcommit", lambda t: t.set(overcommit=False, sources=("thp",)), OK, "is 0", ""),
    (
        "oom-victim",
        lambda t: t.write("proc/sys/vm/oom_kill_allocating_task", "1"),
        WARN,
        "oom_kill_allocating_task is 1: the OOM killer takes whoever asks",
        "oom_kill_allocating_task=0",
    ),
    ("systemd-oomd", lambda t: t.oomd(), OK, "passes /sys/fs/cgroup/system.slice/balloon-agent.service over", ""),
    ("systemd-oomd", lambda t: t.oomd(omits=False), WARN, "may kill all of /sys/.*balloon-agent.service at once", "=omit"),
    ("systemd-oomd", lambda t: (t.oomd(omits=False), t.remove(GROUP)), OK, "shows while that runs", ""),
    (
        "systemd-oomd",
        lambda t: by_hand(t.oomd(omits=False)),
        WARN,
        "may kill all of /sys/fs/cgroup/user.slice at once",
        "ManagedOOMPreference=omit",
    ),
    ("panic-on-oom", lambda t: t.write("proc/sys/vm/panic_on_oom", "1"), WARN, "panic_on_oom is 1", "panic_on_oom=0"),
    ("swap", lambda t: t.write("proc/swaps", "Filename\n/dev/vda2 partition 1 0 -2"), OK, "^/dev/vda2$", ""),
    ("swap", lambda t: t.write("proc/swaps", "Filename\n/dev/zram0 partition 1 0 -2"), OK, "zram0 stays in the guest's", ""),
    ("hibernation", lambda t: t.write("sys/power/resume", "254:2"), WARN, "254:2", "balloonctl deflate"),
    ("hibernation", lambda t: (t.write("sys/power/resume", "254:2"), t.write("sys/power/state", "freeze")), OK, "does not", ""),
    (
        "tracepoints",
        lambda t: (
            t.obstacle("mount -t tracefs none /y", hear="tracepoint x is not to be found"),
            t.remove("sys/kernel/tracing"),
        ),
        WARN,
        "cannot be heard of: tracepoint x is not to be found$",
        "mount -t tracefs none /sys/kernel/tracing",
    ),
    ("tracepoints", lambda t: t.obstacle("that takes CAP_PERFMON", hear="no"), WARN, "heard of: no$", "CAP_SYS_ADMIN"),
    (
        "tracepoints",
        lambda t: t.obstacle(hear="no").write("proc/sys/kernel/perf_event_paranoid", "2"),
        WARN,
        "no",
        "CAP_PERFMON, and let perf_event_open",
    ),
    (
        "tracepoints",
        lambda t: (t.obstacle(hear="no"), t.write("sys/kernel/security/lockdown", "none integrity [confidentiality]")),
        WARN,
        "no",
        "lockdown=integrity",
    ),
    (
        "psi",
        lambda t: t.obstacle("boot with psi=1", stalls="/proc/pressure/memory: Operation not supported"),
        WARN,
        "supported$",
        "psi=1",
    ),
    ("psi", lambda t: (t.obstacle(stalls="no"), t.user(7)), WARN, "not noticed: no", "run this as root"),
    *(("udev-rules", partial(Tree.rules, text=text), *expected) for text, expected in RULES),
    ("udev-rules", lambda t: t.rules(ONLINES).set(sources=("thp",)), OK, "not among the sources", ""),
    (
        "udev-rules",
        lambda t: t.rules(ONLINES).write("sys/devices/system/memory/auto_online_blocks", "online_movable"),
        WARN,
        "line 1",
        "auto_online_blocks is online_movable",
    ),
    # A file hides those of its name in folders that come later, in whichever order these are found.
    ("udev-rules", lambda t: t.rules(ONLINES).rules("", "etc"), OK, "none brings", ""),
    (
        "udev-rules",
        lambda t: t.rules(ONLINES, "etc").rules("", "run"),
        WARN,
        "^/etc/udev/rules.d/40-a.rules, line 1, brings",
        "",
    ),
    ("udev-rules", lambda t: t.rules(ONLINES * 5), WARN, r"line 3, [^;]* \(and 2 more\)", ""),
    ("agent", lambda t: None, OK, "none runs", ""),
    ("control-socket", lambda t: None, OK, "/run/balloon-agent/control is to be had", ""),
    ("control-socket", lambda t: t.set(run_dir=Path("/" + "x" * 90)), FAIL, "too long", "at most 82 bytes"),
    ("metrics-port", lambda t: t.set(metrics_listen="127.0.0.1:22"), FAIL, "on 127.0.0.1 port 22", "ss -ltnp sport = 22"),
    ("metrics-port", lambda t: t.set(metrics_listen="0.0.0.0:22"), FAIL, "on 127.0.0.1 port 22", "ss"),
    ("metrics-port", lambda t: t.set(metrics_listen="localhost:22"), FAIL, "on 127.0.0.1 port 22", "ss"),
    ("metrics-port", lambda t: t.set(metrics_listen="10.0.0.1:22"), OK, "10.0.0.1:22 is free", ""),
    ("metrics-port", lambda t: t.set(metrics_listen="[::1]:22"), OK, r"\[::1\]:22 is free", ""),
    (
        "metrics-port",
        lambda t: t.write("proc/self/net/tcp6", "sl\n 0: 00000000000000000000000000000000:261E 0:0 0A 0"),
        FAIL,
        "on :: port 9758",
        "ss -ltnp",
    ),
    (
        "metrics-port",
        lambda t: t.write("proc/self/net/tcp6", "sl\n 0: 0000000000000000FFFF00000100007F:261E 0:0 0A 0"),
        FAIL,
        "port 9758",
        "ss -ltnp",
    ),
    ("metrics-port", lambda t: t.write("proc/self/net/tcp", "sl\n 0: 0100007F:261E 0:0 01 0"), OK, "is free", ""),
]


@pytest.mark.parametrize(
    ("check", "change", "level", "found", "remedy"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)]
)
def test_what_is_wrong_is_found_with_its_remedy(
    tree: Tree, check: str, change: Change, level: Level, found: str, remedy: str
) -> None:
    change(tree)
    finding = tree.examine()[check]
    assert finding.level is level, finding
    assert re.search(found, finding.found), finding
    assert (finding.remedy is None) == (level is OK)
    assert re.search(remedy, finding.remedy or ""), finding
    assert "\n" not in finding.found + (finding.remedy or "")


def test_each_check_is_seen_both_well_and_ill(tree: Tree) -> None:
    """But for those that know nothing worse than what they find."""
    ill = {check for check, _, level, *_ in CASES if level is not OK} | {"agent", "left-behind"}
    assert {name_of(check) for check in CHECKS} - ill == {"swap"}


def test_what_does_not_concern_an_agent_with_these_options_is_not_said(tree: Tree) -> None:
    tree.set(relief=False, sources=("blocks",))
    tree.write(f"{THP}/shrink_underused", "1")
    assert not {"tracepoints", "psi", "thp-enabled", "thp-defrag", "thp-shrinking"} & tree.examine().keys()


def test_without_a_device_nothing_is_said_of_it(tree: Tree) -> None:
    tree.remove(f"sys/bus/pci/devices/{ADDRESS}")
    findings = tree.examine()
    assert not {"features", "deflate-on-oom", "driver", "interrupt-pin", "iommu"} & findings.keys()
    assert exit_code(findings) == 1


# -- an agent, and what it leaves ------------------------------------------------------------------------------------------


def answering(folder: Path, answer: dict[str, Any]) -> socket.socket:
    """A control socket that answers once."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(folder / "control"))
    server.listen()

    def serve() -> None:
        with suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.makefile("rb").readline()
                connection.sendall(json.dumps(answer).encode() + b"\n")

    threading.Thread(target=serve, daemon=True).start()
    return server


STATUS = {"device": ADDRESS, "state": "resting", "actual_bytes": 424 << 20, "offered_features": 1 << CONT | 1 << OOM}


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as name:
        yield Path(name)


def test_an_agent_that_runs_is_asked(tree: Tree, short: Path) -> None:
    tree.set(run_dir=short)
    tree.bind("uio_pci_generic")
    tree.write("proc/self/net/tcp", "sl\n 0: 0100007F:261E 0:0 0A 0")
    tree.agent()
    # Its limits count, not those of who looks.
    tree.limit("Max open files", 10)
    with closing(answering(short, {"ok": True, "status": STATUS})):
        findings = tree.examine()
    assert {finding.level for finding in findings.values()} == {OK}
    assert findings["agent"].found == "process 4711 runs, resting, with 424 MiB in the balloon"
    assert findings["driver"].found == "uio_pci_generic, for the agent that runs, process 4711"
    assert findings["features"].found == "offered: DEFLATE_ON_OOM, CONT_PAGES"
    assert findings["metrics-port"].found.endswith("is the running agent's")
    assert findings["left-behind"].found.endswith("is the running agent's")


def test_limits_of_an_agent_that_runs_are_named_as_such(tree: Tree) -> None:
    tree.agent()
    tree.write("proc/4711/limits", "Max open files  10  10  files")
    assert tree.examine()["open-files"].found == "the agent, process 4711, may have 10 files open"


@pytest.mark.parametrize(
    ("locks", "answer", "level", "found", "remedy"),
    [
        ({}, None, FAIL, "4711 has the device and does not answer: no agent answers at", "kill 4711"),
        ({}, {"ok": False, "error": "busy"}, FAIL, "does not answer: busy", "kill 4711"),
        ({"run_dir": False}, None, WARN, "4711 has the device, with another run directory", "--run-dir"),
        ({}, {"ok": True, "status": STATUS | {"device": "0000:00:06.0"}}, WARN, "has .* for 0000:00:06.0", "its own --run-dir"),
        ({"device": False}, {"ok": True, "status": STATUS}, OK, "4711 runs, resting", ""),
    ],
)
def test_an_agent_that_does_not_answer_as_it_should(
    tree: Tree, short: Path, locks: dict[str, bool], answer: dict[str, Any] | None, level: Level, found: str, remedy: str
) -> None:
    tree.set(run_dir=short)
    tree.agent(**locks)
    with closing(answering(short, answer)) if answer else nullcontext():
        finding = tree.examine()["agent"]
    assert finding.level is level, finding
    assert re.search(found, finding.found), finding
    assert re.search(remedy, finding.remedy or ""), finding


def test_what_an_agent_has_left_is_listed(tree: Tree) -> None:
    state = StateFile(tree.options.run_dir / "state.json")
    assert tree.examine()["left-behind"] == (OK, "nothing", None)
    state.record_driver(ADDRESS, "virtio-pci")
    state.record_blocks({7: "Normal", 8: "Normal"})
    state.record_sysctl("vm.min_free_kbytes", Changed(5632, (4000,)))
    state.record_pool(2 << 20, 0, 3)
    (tree.options.run_dir / "holders").mkdir()
    (tree.options.run_dir / "holders/abcd").touch()
    finding = tree.examine()["left-behind"]
    assert finding.level is WARN
    assert finding.found == (
        f"an earlier agent has left: {ADDRESS} taken from virtio-pci, 2 blocks offline, vm.min_free_kbytes was 5632, "
        "3 huge pages of 2 MiB, 1 holders"
    )
    assert finding.remedy is not None
    assert "balloon-agent restore undoes it" in finding.remedy
    (tree.options.run_dir / "state.json").write_text("{")
    finding = tree.examine()["left-behind"]
    assert finding.level is FAIL
    assert "state.json is damaged" in finding.found


def test_who_has_a_lock_is_seen_without_taking_it(tmp_path: Path) -> None:
    path = device_lock(ADDRESS, tmp_path)
    assert who_locks(path) is None
    lock = Lock(path, "it")
    assert who_locks(path) == os.getpid()
    lock.close()
    assert path.exists()
    assert who_locks(path) is None


# -- what a machine's files may say, and who may read them -------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(FILES)),
    content=st.none() | st.binary(max_size=60) | st.sampled_from([b"", b"-1", b"0", b"max", b"9" * 30]),
)
@example(name="sys/devices/system/memory/auto_online_blocks", content=b"a\r\x1b[2Jb")
def test_no_file_that_is_missing_or_makes_no_sense_keeps_the_rest_from_being_said(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes | None
) -> None:
    tree = Tree(tmp_path_factory.mktemp("odd"))
    if content is None:
        tree.remove(name)
    else:
        (tree.root / name).write_bytes(content)
    findings = tree.examine()
    assert {"user", "kernel", "options", "device", "memory-blocks", "agent", "metrics-port"} <= findings.keys()
    assert "".join(finding.found + (finding.remedy or "") for finding in findings.values()).isprintable()
    json.loads(as_json(findings))


def test_what_may_not_be_read_is_said_to_need_root(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is hidden from root, whom the tests may be run by."""
    machine = Machine(tree.options, tree.root, FINE)

    def refuse(name: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", name)

    monkeypatch.setattr(machine, "read", refuse)
    finding = examine(machine)["swap"]
    assert finding == (WARN, "proc/swaps may not be looked at: Permission denied", "run this as root")


def test_frames_that_are_hidden_are_an_obstacle(tmp_path: Path) -> None:
    obstacle = obstacle_to_translating(str(tmp_path))
    assert obstacle is not None
    assert "No such file" in obstacle.found


# -- what is printed -----------------------------------------------------------------------------------------------------

FOUND = {
    "swap": Finding(OK, "none"),
    "io-uring": Finding(WARN, "forbidden", "allow it"),
    "device": Finding(FAIL, "none", "add it"),
}


def test_a_line_for_each_and_what_to_do_below_it() -> None:
    assert as_text(FOUND).splitlines() == [
        "ok    swap      none",
        "warn  io-uring  forbidden",
        "                -> allow it",
        "fail  device    none",
        "                -> add it",
        "1 ok, 1 warn, 1 fail",
    ]
    assert "\033[31mfail\033[0m  device" in as_text(FOUND, coloured=True)


def test_json_has_the_same() -> None:
    assert json.loads(as_json(FOUND)) == [
        {"check": "swap", "level": "ok", "found": "none", "remedy": None},
        {"check": "io-uring", "level": "warn", "found": "forbidden", "remedy": "allow it"},
        {"check": "device", "level": "fail", "found": "none", "remedy": "add it"},
    ]


def test_the_exit_code_counts_failures_alone() -> None:
    assert exit_code(FOUND) == 1
    assert exit_code({name: finding for name, finding in FOUND.items() if finding.level is not FAIL}) == 0


def test_the_command_looks_at_the_options_and_says_all_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("\nreserv = 1\n")
    command = [sys.executable, "-m", "balloon_agent.cli.agent", "doctor", "--json", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert done.stderr == ""
    assert findings["options"]["level"] == "fail"
    assert "agent.toml, line 2, reserv" in findings["options"]["found"]
    assert "memory-blocks" in findings
