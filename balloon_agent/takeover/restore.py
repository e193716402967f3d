"""Undo what an agent has changed outside itself and could not undo: for who wants no other agent to go on with it.

The device first: only when it has been reset does no host act on what was posted to it. Then the memory, then the driver.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from balloon_agent.access.binding import clear_override
from balloon_agent.access.host import group_of
from balloon_agent.access.names import DRIVERS
from balloon_agent.access.pci import PciFunction, functions
from balloon_agent.errors import BalloonError, NotPermitted
from balloon_agent.guest.min_free import NAME as MIN_FREE
from balloon_agent.guest.shared_sysctls import SharedSettings
from balloon_agent.guest.sysctls import put_back
from balloon_agent.linux import huge_page_pools, memory_blocks
from balloon_agent.memory import left_behind
from balloon_agent.memory.holders import Holders
from balloon_agent.options import Options

from .device_slot import Seat
from .held import HOLDERS, what_is_held
from .lock import LOCK_DIR, lock_run_dir
from .state import StateFile

_log = logging.getLogger(__name__)


def restore(
    run_dir: Path,
    memory_root: str = memory_blocks.MEMORY_ROOT,
    hugepages_root: str = huge_page_pools.HUGEPAGES_ROOT,
    sysfs_root: Path = Path("/sys"),
    sysctl_root: str = "/proc/sys",
    locks: Path = LOCK_DIR,
) -> None:
    """Put everything back. BalloonError if an agent is running, or if something did not go back: that stays on record."""
    if os.geteuid() != 0:
        raise NotPermitted(f"this must be run as root, not as user {os.geteuid()} (try sudo)")
    if not run_dir.is_dir():
        _log.info("nothing to restore: there is no %s", run_dir)
        return
    with closing(lock_run_dir(run_dir)):
        if not put_back_all(
            run_dir, StateFile(run_dir / "state.json"), memory_root, hugepages_root, sysfs_root, sysctl_root, locks
        ):
            _log.info("nothing to restore: nothing is on record in %s", run_dir)


def put_back_all(
    run_dir: Path,
    state: StateFile,
    memory_root: str = memory_blocks.MEMORY_ROOT,
    hugepages_root: str = huge_page_pools.HUGEPAGES_ROOT,
    sysfs_root: Path = Path("/sys"),
    sysctl_root: str = "/proc/sys",
    locks: Path = LOCK_DIR,
) -> bool:
    """``restore`` for who has the lock of the run directory already. False if there was nothing to put back."""
    if state.empty and not left_behind.sockets(run_dir / HOLDERS):
        return False
    held = partial(what_is_held, state, run_dir, memory_root)
    with ExitStack() as stack:
        for address in list(state.previous_drivers):
            _reset(address, state, held, stack, sysfs_root)
        problems = undo(state, Holders(run_dir / HOLDERS), memory_root, hugepages_root, sysctl_root, locks)
    if problems:
        raise BalloonError("; ".join(problems))
    return True


def undo(
    state: StateFile,
    holders: Holders,
    memory_root: str = memory_blocks.MEMORY_ROOT,
    hugepages_root: str = huge_page_pools.HUGEPAGES_ROOT,
    sysctl_root: str = "/proc/sys",
    locks: Path = LOCK_DIR,
) -> list[str]:
    """Put everything back but the device, which must have been reset. Returns in words what did not go: it stays on record."""
    ended, lost = holders.end_all()
    thp_enabled = str(Path(hugepages_root).with_name("transparent_hugepage") / "enabled")
    for pid in ended:
        _log.info("process %d has ended, and what it held is the guest's", pid)
    return [
        *lost,
        # Before the blocks: the kernel chooses the watermark anew when these come back, and is right then.
        *_restore_sysctls(state, state.shared_settings(locks), sysctl_root, thp_enabled),
        *_restore_blocks(state, memory_root),
        *_restore_pools(state, hugepages_root),
    ]


def _reset(address: str, state: StateFile, held: Callable[[], str | None], stack: ExitStack, sysfs_root: Path) -> None:
    """Reset a device that is still where the agent had it; the stack gives it back. Nobody else's is touched."""
    for function in functions(sysfs_root):
        # Without a driver it is if somebody died while it was handed over.
        if function.address == address and function.driver in (*DRIVERS, None):
            seat = Seat(Options(vfio_noiommu=_noiommu(function)), state, held)
            stack.callback(seat.close)
            seat.take(function)
            return
        if function.address == address:
            clear_override(function)
    _log.info("%s is not with %s any more", address, " or ".join(DRIVERS))
    state.forget_driver(address)


def _noiommu(function: PciFunction) -> bool:
    """Whether an agent had it by vfio without an IOMMU."""
    group = group_of(function)
    return group is not None and Path(f"/dev/vfio/noiommu-{group.number}").exists()


def _restore_blocks(state: StateFile, root: str) -> list[str]:
    problems: list[str] = []
    size = memory_blocks.block_size(root) or 0
    for number, zone in list(state.blocks.items()):
        now = memory_blocks.state(root, number)
        if now not in (*memory_blocks.BACK, "offline"):
            # A worker that could not be ended is at it: it may become offline yet.
            problems.append(f"memory{number} is {now}: try again later")
            continue
        if now == "offline":
            block = memory_blocks.Block(number, memory_blocks.block_run(number, size), zone)
            try:
                memory_blocks.set_state(root, number, block.online_state)
            except OSError as error:
                problems.append(f"memory{number} does not come back: {error.strerror}")
                continue
            _log.info("memory%d is online again", number)
        problems += _noted(partial(state.forget_blocks, [number]))
    return problems


def _restore_pools(state: StateFile, root: str) -> list[str]:
    problems: list[str] = []
    for size, (before, added) in list(state.pools.items()):
        try:
            now = huge_page_pools.pages(root, size)
            # Somebody else may have made it smaller or larger meanwhile: what was added goes, and no more than that.
            then = min(now, max(before, now - added))
            if then != now:
                huge_page_pools.set_pages(root, size, then)
        except OSError as error:
            problems.append(f"the pool of huge pages of {size >> 10} kB does not shrink: {error.strerror}")
            continue
        _log.info("the pool of huge pages of %d kB has %d again, not %d", size >> 10, then, now)
        problems += _noted(partial(state.record_pool, size, before, 0))
    return problems


def _restore_sysctls(state: StateFile, shared: SharedSettings, root: str, thp_enabled: str) -> list[str]:
    problems: list[str] = []
    # The watermark last: what the kernel chooses for it depends on the others.
    for name, changed in sorted(state.sysctls.items(), key=lambda item: item[0] == MIN_FREE):
        try:
            now = put_back(name, changed, shared, root, thp_enabled)
        except OSError as error:
            problems.append(f"{name} does not become {changed.before} again: {error.strerror}")
            continue
        if now is None:
            _log.info("%s was changed by somebody else, and stays so", name)
        else:
            _log.info("%s is %d again%s", name, now, "" if now == changed.before else f", and not {changed.before}")
        problems += _noted(partial(state.record_sysctl, name, None))
    return problems


def _noted(note: Callable[[], None]) -> list[str]:
    """Take something off the record. That it cannot be written keeps nothing else from going back."""
    try:
        note()
    except OSError as error:
        return [f"what went back stays on record: {error}"]
    return []
