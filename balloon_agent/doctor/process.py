"""What the agent's process may do: privileges, limits, and those of its control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from balloon_agent.access import descriptors
from balloon_agent.access.host import is_loaded
from balloon_agent.access.names import DRIVERS
from balloon_agent.size import format_size

from .capability import Capability
from .machine import (
    Finding,
    Machine,
    fail,
    ok,
    warn,
)

SERVICE = "sys/fs/cgroup/system.slice/balloon-agent.service"
_ROOT = "sys/fs/cgroup"
_OOMD = "sys/fs/cgroup/system.slice/systemd-oomd.service"
# A holder for each GiB, or up to 16 smaller ones; and the threads that serve clients.
TASKS = 128


def user(machine: Machine) -> Finding:
    if machine.is_root:
        return ok("root")
    return warn("not root: some of this could not be looked at, and the agent could not run", "run it as root (try sudo)")


def capabilities(machine: Machine) -> Finding:
    if not machine.may(Capability.SYS_ADMIN):
        return machine.bad(
            f"{machine.whose} lacks CAP_SYS_ADMIN: no frame numbers, and no device",
            "give the agent CAP_SYS_ADMIN (CapabilityBoundingSet= of the unit)",
        )
    uses = {
        Capability.SYS_RESOURCE: "the OOM killer may choose the agent",
        Capability.SYS_NICE: "it has to wait for its turn in a busy guest",
    }
    if machine.options.control_group is not None:
        uses[Capability.CHOWN] = "the control socket is not given to its group"
    if not any(is_loaded(driver, machine.root) for driver in DRIVERS):
        uses[Capability.SYS_MODULE] = f"neither {' nor '.join(DRIVERS)} can be loaded"
    lacking = {which: harm for which, harm in uses.items() if not machine.may(which)}
    if lacking:
        harm = ", ".join(f"CAP_{which.name} ({harm})" for which, harm in lacking.items())
        return warn(f"{machine.whose} lacks {harm}", "give the agent these (CapabilityBoundingSet= of the unit)")
    return ok(f"{machine.whose} has all that it needs")


def locked_memory(machine: Machine) -> Finding:
    limit = machine.limit("Max locked memory")
    if machine.may(Capability.IPC_LOCK):
        return ok("no limit holds for who has CAP_IPC_LOCK")
    if limit is None:
        return ok("unlimited")
    return machine.bad(
        f"{machine.whose} may lock and pin {limit} bytes and no more",
        "give the agent CAP_IPC_LOCK, or LimitMEMLOCK=infinity (ulimit -l unlimited)",
    )


def open_files(machine: Machine) -> Finding:
    limit = machine.limit("Max open files")
    if limit is None or limit >= descriptors.LEAST:
        return ok(f"{'any number' if limit is None else limit}")
    return machine.bad(f"{machine.whose} may have {limit} files open", "LimitNOFILE=4096 (ulimit -n 4096)")


def _groups(machine: Machine) -> Iterator[Path]:
    """The service's control group, or that of the process itself, and all that it is in."""
    group = machine.root / SERVICE
    if not group.is_dir():
        lines = (machine.read(f"proc/{machine.process}/cgroup") or "").splitlines()
        own = next((line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), None)
        if own is None or not (machine.root / _ROOT / "cgroup.controllers").exists():
            raise LookupError("there is no cgroup2 at /sys/fs/cgroup")
        group = machine.root / _ROOT / own
    while group != machine.root / _ROOT and group != group.parent:
        yield group
        group = group.parent


def _limit(group: Path, name: str) -> int | None:
    path = group / name
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" else int(text)


def control_group(machine: Machine) -> Finding:
    try:
        groups = list(_groups(machine))
    except LookupError as error:
        return warn(f"limits are not known: {error}", "boot with systemd.unified_cgroup_hierarchy=1, and look again")
    meminfo = dict(line.split(":", 1) for line in (machine.read("proc/meminfo") or "").splitlines() if ":" in line)
    memory = int(meminfo.get("MemTotal", "0").split()[0]) << 10
    for group in groups:
        name = f"/{group.relative_to(machine.root)}"
        for which, unit in (("memory.max", "MemoryMax="), ("memory.high", "MemoryHigh=")):
            limit = _limit(group, which)
            if limit is not None and limit < memory:
                return fail(
                    f"{name}/{which} is {format_size(limit // 4096 * 4096)}: what the balloon holds counts",
                    f"leave {unit} out of the unit, and of what it is in",
                )
    for group in groups:
        name = f"/{group.relative_to(machine.root)}"
        tasks = _limit(group, "pids.max")
        if tasks is not None and tasks < TASKS:
            return warn(f"{name}/pids.max is {tasks}: holders and threads may be more", f"TasksMax={4 * TASKS} in the unit")
        if _limit(group, "memory.oom.group"):
            return warn(
                f"{name}/memory.oom.group is 1: the OOM killer takes the agent with the holder that it chooses",
                "OOMPolicy=continue in the unit",
            )
    own = f"/{groups[0].relative_to(machine.root)}" if groups else f"/{_ROOT}"
    return ok(f"{own} has no limits that matter")


def systemd_oomd(machine: Machine) -> Finding:
    """It kills a whole control group at once: the agent with its holders, and nobody is left to tell the host."""
    if not machine.read(f"{_OOMD}/cgroup.procs"):
        return ok("does not run")
    try:
        group = next(iter(_groups(machine)), None)
    except LookupError:
        group = None
    if group is None or (machine.agent is None and group != machine.root / SERVICE):
        return ok("runs; whether it passes the agent over shows while that runs")
    name = f"/{group.relative_to(machine.root)}"
    if machine.trials.omits(group):
        return ok(f"runs, and passes {name} over")
    return warn(
        f"runs, and may kill all of {name} at once: the agent and its holders, with what they hold",
        "ManagedOOMPreference=omit in the unit (systemd 248), and a control group of root's",
    )
