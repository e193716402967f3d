"""The kernel's part: pins, frame numbers, and how need of memory is heard of."""

from __future__ import annotations

import re

from balloon_agent.access import host
from balloon_agent.guest.pressure_events import LATE_TRACEPOINT, TRACEFS, TRACEPOINT
from balloon_agent.guest.supported import unsupported

from .capability import Capability
from .machine import (
    Finding,
    Machine,
    fail,
    ok,
    warn,
)

# MADV_POPULATE_WRITE came with it.
OLDEST = (5, 14)
_IO_URING = "kernel.io_uring_disabled"
_YAMA = "kernel.yama.ptrace_scope"
# Documentation/admin-guide/LSM/Yama.rst
_ADMIN_ONLY, _NOBODY = 2, 3


def kernel(machine: Machine) -> Finding:
    release = machine.read("proc/sys/kernel/osrelease") or ""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        return warn(f"Linux {release or '(which one is not known)'}", "see whether it is 5.14 or later")
    if (int(match[1]), int(match[2])) < OLDEST:
        return fail(f"Linux {release} is older than 5.14", "install a later kernel: Debian 12 has 6.1")
    return ok(f"Linux {release}")


def supported(machine: Machine) -> Finding:
    kind, page_size, end = machine.trials.machine()
    if (found := unsupported(kind, page_size, end)) is not None:
        return fail(*found)
    return ok(f"{kind} with pages of {page_size} bytes")


def io_uring(machine: Machine) -> Finding:
    setting = machine.sysctl(_IO_URING)
    named = "" if setting is None else f" ({_IO_URING} is {setting})"
    obstacle = machine.trials.pin()
    if obstacle is None:
        return ok(f"memory can be pinned{named}")
    remedy = f"sysctl {_IO_URING}=0" if setting else "let io_uring_setup and io_uring_register through the seccomp filter"
    found = f"memory cannot be pinned: io_uring is forbidden{named}"
    if "blocks" in machine.options.sources or machine.options.allow_unpinned:
        return warn(f"{found}; only whole memory blocks can be taken", remedy)
    return machine.bad(found, f"{remedy}; or add `blocks` to the sources, which needs no pin")


def pagemap(machine: Machine) -> Finding:
    obstacle = machine.trials.translate()
    if obstacle is None:
        return ok("the frame numbers of memory can be seen")
    return machine.bad(f"the frame numbers of memory cannot be seen: {obstacle.found}", "give the agent CAP_SYS_ADMIN")


def ptrace(machine: Machine) -> Finding:
    """pidfd_getfd(2) needs PTRACE_MODE_ATTACH, and an agent's holders may be children of the one before it."""
    scope = machine.sysctl(_YAMA)
    named = "unrestricted" if not scope else f"{_YAMA} is {scope}"
    if scope and scope >= _NOBODY:
        return fail(
            f"{named}: the agent cannot have duplicates of its holders' pins",
            f"{_YAMA} must be 2 or less, which takes a boot",
        )
    if scope and not machine.may(Capability.SYS_PTRACE):
        return (machine.bad if scope >= _ADMIN_ONLY else warn)(
            f"{named}: without CAP_SYS_PTRACE there are no duplicates of the pins of holders that an earlier agent has left",
            "give the agent CAP_SYS_PTRACE",
        )
    return ok(f"{named}: the pins of holders can be duplicated")


def tracepoints(machine: Machine) -> Finding | None:
    if not machine.options.relief:
        return None
    obstacle = machine.trials.hear()
    paranoid = machine.sysctl("kernel.perf_event_paranoid")
    if obstacle is None:
        return ok(f"need of memory is heard of (perf_event_paranoid is {paranoid})")
    found = f"need of memory is looked for, since it cannot be heard of: {obstacle.found}"
    for folder in TRACEFS:
        try:
            if all((machine.root / folder / "events" / name / "id").exists() for name in (TRACEPOINT, LATE_TRACEPOINT)):
                break
        except PermissionError:
            return warn(found, "run this as root")
    else:
        return warn(found, "mount -t tracefs none /sys/kernel/tracing")
    if host.lockdown(machine.sysfs) == "confidentiality":
        return warn(found, "boot with lockdown=integrity or none")
    # Debian's kernel knows of 3, with which CAP_PERFMON is not enough.
    which = "CAP_SYS_ADMIN" if paranoid is not None and paranoid > 2 else "CAP_PERFMON"
    return warn(found, f"give the agent {which}, and let perf_event_open through its seccomp filter")


def psi(machine: Machine) -> Finding | None:
    if not machine.options.relief:
        return None
    obstacle = machine.trials.stalls()
    if obstacle is None:
        return ok("thrashing is noticed, by pressure stall information")
    if not machine.is_root and machine.read("proc/pressure/memory"):
        return warn(f"thrashing is not noticed: {obstacle.found}", "run this as root")
    return warn(f"thrashing is not noticed: {obstacle.found}", "boot with psi=1, and a kernel with CONFIG_PSI")
