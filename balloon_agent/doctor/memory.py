"""Where memory could come from, and settings that stand in the way of it."""

from __future__ import annotations

import os
from collections import Counter

from balloon_agent.access.host import chosen
from balloon_agent.guest.sysctls import ALLOCATING_TASK, HEURISTIC, OVERCOMMIT
from balloon_agent.holder.allocate import HUGETLB_SIZES
from balloon_agent.holder.holes import SPLIT_HUGE_PAGES
from balloon_agent.linux import huge_page_pools
from balloon_agent.linux import memory_blocks as blocks
from balloon_agent.memory.hidden import CGROUP_ROOT, NODE_ROOT, reclaim_file
from balloon_agent.size import format_size

from .machine import (
    Finding,
    Machine,
    fail,
    ok,
    warn,
)

_THP = "sys/kernel/mm/transparent_hugepage"
_STRICT = 2


def _memory_root(machine: Machine) -> str:
    return str(machine.root / blocks.MEMORY_ROOT.lstrip("/"))


def _zones(machine: Machine) -> Counter[str]:
    return Counter(block.zone for block in blocks.known_blocks(_memory_root(machine)))


def memory_blocks(machine: Machine) -> Finding:
    root = _memory_root(machine)
    size = blocks.block_size(root)
    if size is None:
        found, remedy = "this kernel has no memory blocks", "a kernel with CONFIG_MEMORY_HOTPLUG and CONFIG_MEMORY_HOTREMOVE"
    else:
        zones, number = _zones(machine), blocks.count(root)
        if zones:
            named = ", ".join(f"{count} in {zone}" for zone, count in sorted(zones.items()))
            policy = machine.read(f"{blocks.MEMORY_ROOT.lstrip('/')}/auto_online_blocks")
            added = "" if policy is None else f"; new ones go {policy}"
            return ok(f"of {number} blocks of {format_size(size)} {zones.total()} could be tried ({named}){added}")
        found, remedy = (
            f"of {number} blocks of {format_size(size)} none can be taken offline",
            "a kernel with CONFIG_MEMORY_HOTREMOVE",
        )
    if "blocks" not in machine.options.sources:
        return ok(f"{found}, and `blocks` is not among the sources")
    if list(machine.options.sources) == ["blocks"]:
        return fail(found, f"{remedy}; or other sources")
    return warn(f"{found}: huge pages are taken instead, more slowly", remedy)


def movable_zone(machine: Machine) -> Finding:
    movable = _zones(machine)["Movable"]
    if not movable:
        return ok("none")
    if any(source in HUGETLB_SIZES for source in machine.options.sources):
        return warn(
            f"{movable} blocks are in ZONE_MOVABLE, where hugetlbfs takes its pages from, and they cannot be pinned there",
            "leave hugetlb out of the sources, or boot without movablecore= and movable_node",
        )
    return ok(f"{movable} blocks are in it, and easy to take offline")


def hugepages(machine: Machine) -> Finding:
    root = str(machine.root / huge_page_pools.HUGEPAGES_ROOT.lstrip("/"))
    missing = [
        source
        for source in machine.options.sources
        if source in HUGETLB_SIZES and not huge_page_pools.exists(root, HUGETLB_SIZES[source])
    ]
    if missing:
        return warn(
            f"the kernel has no huge pages of the size of {', '.join(missing)}",
            f"leave {', '.join(missing)} out of the sources, or give the guest a processor with pdpe1gb (QEMU: -cpu host)",
        )
    pools = [
        f"{format_size(size)}: {huge_page_pools.pages(root, size)} ({_free(machine, size)} free)"
        for size in sorted(HUGETLB_SIZES.values())
        if huge_page_pools.exists(root, size)
    ]
    return ok("; ".join(pools) or "the kernel has no hugetlbfs, and none is asked for")


def _relative(size: int) -> str:
    return huge_page_pools.folder(huge_page_pools.HUGEPAGES_ROOT, size).lstrip("/")


def _free(machine: Machine, size: int) -> int:
    return int(machine.read(f"{_relative(size)}/free_hugepages") or 0)


def thp_enabled(machine: Machine) -> Finding | None:
    if "thp" not in machine.options.sources:
        return None
    text = machine.read(f"{_THP}/enabled")
    if text is None:
        return warn("this kernel has no transparent huge pages", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    if (state := chosen(text)) in ("always", "madvise"):
        return ok(f"{state}")
    return warn(f"{state}: none can be taken", f"echo madvise >/{_THP}/enabled")


def thp_defrag(machine: Machine) -> Finding | None:
    text = machine.read(f"{_THP}/defrag")
    if "thp" not in machine.options.sources or text is None:
        return None
    state = chosen(text)
    # defer: kcompactd is woken up, and does it later. Both others wait for what madvise asks for.
    if state in ("never", "defer"):
        return warn(f"{state}: only what lies ready is taken", f"echo madvise >/{_THP}/defrag")
    return ok(f"{state}")


def thp_shrinking(machine: Machine) -> Finding | None:
    """deferred_split_scan() in mm/huge_memory.c reads huge pages that are hardly used, to split them. Linux 6.12."""
    state = machine.read(f"{_THP}/shrink_underused")
    if state is None or "thp" not in machine.options.sources:
        return None
    if state == "0":
        return ok("off")
    return warn(
        "the kernel looks into huge pages for zeros, and what the host has taken comes back as it does",
        f"echo 0 >/{_THP}/shrink_underused",
    )


def hidden_memory(machine: Machine) -> Finding | None:
    """The means by which holes of huge pages are freed: see balloon_agent.memory.hidden."""
    if chosen(machine.read(f"{_THP}/enabled") or "[never]") == "never":
        return None
    path = SPLIT_HUGE_PAGES.lstrip("/")
    try:
        os.close(os.open(machine.root / path, os.O_WRONLY | os.O_CLOEXEC))
        return ok("huge pages with holes can be split")
    except PermissionError:
        if not machine.is_root:
            return warn(f"/{path} is for root alone to look at", "run this as root")
        found, remedy = f"/{path} is locked", "boot with lockdown=none"
    except OSError as error:
        found, remedy = f"/{path}: {error.strerror}", "mount -t debugfs none /sys/kernel/debug"
    if reclaim_file(*(machine.root / folder.relative_to("/") for folder in (CGROUP_ROOT, NODE_ROOT))) is None:
        return warn(
            f"{found}: what is freed in huge pages of programs stays hidden until the kernel is short of memory", remedy
        )
    return warn(f"{found}: what is freed in huge pages of programs comes back by reclaim, which evicts some cache", remedy)


def compaction(machine: Machine) -> Finding | None:
    moves = machine.sysctl("vm.compact_unevictable_allowed")
    if moves is None:
        return None
    if moves and machine.options.allow_unpinned and machine.trials.pin() is not None:
        return warn(
            "vm.compact_unevictable_allowed is 1, and nothing is pinned: memory of the balloon's will be moved",
            "sysctl vm.compact_unevictable_allowed=0, which is half a remedy: do without --allow-unpinned",
        )
    return ok(f"vm.compact_unevictable_allowed is {moves}; what is pinned stays in place")


def overcommit(machine: Machine) -> Finding | None:
    mode = machine.sysctl(OVERCOMMIT)
    if mode is None:
        return None
    if "blocks" in machine.options.sources:
        if mode == _STRICT:
            return warn(
                f"{OVERCOMMIT} is 2: with each block that is offline programs are granted less",
                f"sysctl {OVERCOMMIT}=0, or leave `blocks` out of the sources",
            )
        if mode == HEURISTIC and not machine.options.overcommit:
            return warn(
                f"{OVERCOMMIT} is 0, and stays so: while blocks are offline large mappings are refused",
                f"do without overcommit = false, or leave `blocks` out of the sources; or sysctl {OVERCOMMIT}=1",
            )
    return ok(f"{OVERCOMMIT} is {mode}")


def panic_on_oom(machine: Machine) -> Finding | None:
    mode = machine.sysctl("vm.panic_on_oom")
    if not mode:
        return None if mode is None else ok("off: the OOM killer may take a holder")
    return warn(
        f"vm.panic_on_oom is {mode}: a guest that runs out of memory dies, where the balloon's holders would have saved it",
        "sysctl vm.panic_on_oom=0",
    )


def oom_victim(machine: Machine) -> Finding | None:
    mode = machine.sysctl(ALLOCATING_TASK)
    if mode is None:
        return None
    if mode == 0:
        return ok("the OOM killer takes the process with the highest score: a holder, where the host bears that")
    return warn(
        f"{ALLOCATING_TASK} is {mode}: the OOM killer takes whoever asks for memory, and no holder of the balloon's",
        f"sysctl {ALLOCATING_TASK}=0, then reload the agent",
    )


def swap(machine: Machine) -> Finding:
    lines = (machine.read("proc/swaps") or "").splitlines()[1:]
    names = [line.split()[0] for line in lines if line.split()]
    if not names:
        return ok("none")
    compressed = [name for name in names if "zram" in name]
    note = f"; what goes to {', '.join(compressed)} stays in the guest's memory" if compressed else ""
    return ok(f"{', '.join(names)}{note}")


def hibernation(machine: Machine) -> Finding:
    states = (machine.read("sys/power/state") or "").split()
    # Documentation/power/interface.rst; the device as major:minor.
    device = machine.read("sys/power/resume") or "0:0"
    if "disk" not in states or device == "0:0":
        return ok("this guest does not hibernate")
    return warn(
        f"the guest can hibernate (to {device}), which is not supported with a balloon held",
        "balloonctl deflate before it does; or boot with noresume and mask hibernate.target",
    )
