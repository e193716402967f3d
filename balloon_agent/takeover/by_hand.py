"""Listing balloons, and binding them by hand: what an agent does when it starts and ends, on its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from balloon_agent.access import host
from balloon_agent.access.binding import (
    choose_driver,
    give_to_kernel,
    obstacle,
    take,
)
from balloon_agent.access.names import DRIVERS
from balloon_agent.access.pci import PciFunction, find_balloon, functions
from balloon_agent.errors import DeviceBusy, NotPermitted, Obstacle
from balloon_agent.options import Options

from .held import what_is_held
from .lock import LOCK_DIR, lock_device, who_drives
from .state import StateFile


def devices(*, as_json: bool = False, sysfs_root: Path | None = None, locks: Path = LOCK_DIR) -> str:
    """Every balloon of this machine, for people or as JSON; "there is none" is an answer, too."""
    found = [_described(function, sysfs_root, locks) for function in functions(sysfs_root) if function.is_balloon]
    if as_json:
        return json.dumps(found, indent=2)
    if not found:
        return "there is no virtio balloon on the PCI bus"
    lines: list[str] = []
    for each in found:
        agent = f", an agent drives it (process {each['agent_pid']})" if each["agent_pid"] else ""
        group = f"IOMMU group {each['iommu_group']}" if each["iommu_group"] else "no IOMMU"
        lines.append(f"{each['address']}  {each['driver'] or 'no driver'}{agent}; {group}")
        lines += [f"  {driver}: {why or 'possible'}" for driver, why in each["obstacles"].items()]
    return "\n".join(lines)


def _described(function: PciFunction, sysfs_root: Path | None, locks: Path) -> dict[str, Any]:
    group = host.group_of(function)
    return {
        "address": function.address,
        "driver": function.driver,
        "agent_pid": who_drives(function.address, locks),
        "iommu_group": None if group is None else group.number,
        "obstacles": {driver: _words(obstacle(function, driver, sysfs_root or host.SYSFS)) for driver in DRIVERS},
    }


def bind(options: Options) -> str:
    """Take the balloon from the kernel's driver, which gives its pages back first. It stays bound. What was done, in words.

    DeviceBusy if an agent drives it. On any failure the old driver has it.
    """
    function = _mine(options)
    lock = lock_device(function.address)
    try:
        driver = choose_driver(function, options.driver, noiommu=options.vfio_noiommu)
        before = function.driver
        take(function, driver)
    finally:
        lock.close()
    was = "already" if before == driver else f"and was with {before or 'no driver'}"
    return f"{function.address} is with {driver} now, {was}; balloon-agent unbind gives it back"


def unbind(options: Options) -> str:
    """Give the balloon to the kernel's driver. What was done, in words.

    DeviceBusy if an agent drives it, or if one that was killed has left memory in it. On any failure the old driver has it.
    """
    function = _mine(options)
    lock = lock_device(function.address)
    try:
        state = StateFile(options.run_dir / "state.json")
        held = what_is_held(state, options.run_dir)
        if function.address in state.previous_drivers or (held and not state.previous_drivers):
            raise DeviceBusy(
                f"an agent that was killed has left {function.address} with what it held ({held or 'no memory'}): "
                "balloon-agent restore gives back both, or start an agent to go on with it"
            )
        give_to_kernel(function)
    finally:
        lock.close()
    return f"{function.address} is with {function.driver} now"


def _mine(options: Options) -> PciFunction:
    if os.geteuid() != 0:
        raise NotPermitted(f"this must be run as root, not as user {os.geteuid()} (try sudo)")
    return find_balloon(options.device, functions())


def _words(why: Obstacle | None) -> str | None:
    return None if why is None else str(why)
