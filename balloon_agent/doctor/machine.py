"""What the checks look at, and what they say."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from balloon_agent.access.pci import PciFunction, find_balloon, functions
from balloon_agent.api.client import ask_status
from balloon_agent.errors import BalloonError, DeviceNotFound, NotPermitted, Obstacle
from balloon_agent.guest.pressure_events import KswapdWakeups, Stalls
from balloon_agent.guest.supported import this_machine
from balloon_agent.linux.pagemap import obstacle_to_translating
from balloon_agent.linux.pin import obstacle_to_pinning
from balloon_agent.options import Options
from balloon_agent.paths import SOCKET_NAME
from balloon_agent.takeover.lock import (
    LOCK_DIR,
    OLD_LOCK_DIR,
    run_dir_lock,
    who_drives,
    who_locks,
)

# Seconds. An agent that is well answers at once.
STATUS_DEADLINE = 5.0
_CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]+)$", re.MULTILINE)
_USER = re.compile(r"^Uid:\s*\d+\s+(\d+)", re.MULTILINE)


class Level(StrEnum):
    """How much it matters: nothing, something works worse, the agent would not do its work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """What one check has found, and what to do about it: one line each."""

    level: Level
    found: str
    remedy: str | None = None


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warn(found: str, remedy: str) -> Finding:
    return Finding(Level.WARN, found, remedy)


def fail(found: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, found, remedy)


class _Open(Protocol):
    def close(self) -> None: ...


def _obstacle(open_it: Callable[[], _Open]) -> Obstacle | None:
    try:
        open_it().close()
    except (NotPermitted, OSError) as error:
        return Obstacle.of(error)
    return None


def _omits(group: Path) -> bool:
    """What ManagedOOMPreference=omit writes, and systemd-oomd believes of a group of root's: src/oom/oomd-util.c of systemd."""
    try:
        return os.getxattr(group, "user.oomd_omit") in (b"1", b"yes", b"true", b"on") and group.stat().st_uid == 0
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


@dataclass(frozen=True)
class Trials:
    """What can only be known by trying: each says why it cannot be done, or None. Nothing stays of any."""

    pin: Callable[[], Obstacle | None] = obstacle_to_pinning
    translate: Callable[[], Obstacle | None] = obstacle_to_translating
    hear: Callable[[], Obstacle | None] = lambda: _obstacle(KswapdWakeups)
    stalls: Callable[[], Obstacle | None] = lambda: _obstacle(Stalls)
    # Whether systemd-oomd passes a control group over.
    omits: Callable[[Path], bool] = _omits
    # Its kind, the size of its pages, and where its RAM ends.
    machine: Callable[[], tuple[str, int, int]] = this_machine


class Machine:
    """A guest, through its files below ``root``, and what an agent in it is to do.

    What is looked at more than once is looked at first when it is asked for, and stays.
    """

    def __init__(
        self,
        options: Options,
        root: Path = Path("/"),
        trials: Trials | None = None,
        problem: str | None = None,
        file: Path | None = None,
    ) -> None:
        self.options = options
        self.root = root
        self.trials = trials or Trials()
        # What is wrong with the options, which are the defaults then; and the file that they are from.
        self.problem = problem
        self.file = file

    # -- files ------------------------------------------------------------------------------------------------------

    @property
    def sysfs(self) -> Path:
        return self.root / "sys"

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    def read(self, name: str) -> str | None:
        """What a file says, None if it is not there. PermissionError if it says so to root alone."""
        try:
            return (self.root / name).read_text(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sysctl(self, name: str) -> int | None:
        """A setting of the kernel's, by its name with dots; None if it has none such."""
        text = self.read(f"proc/sys/{name.replace('.', '/')}")
        return None if text is None else int(text)

    # -- who looks ----------------------------------------------------------------------------------------------------

    @cached_property
    def is_root(self) -> bool:
        match = _USER.search(self.read("proc/self/status") or "")
        return match is not None and int(match[1]) == 0

    @property
    def bad(self) -> Callable[[str, str], Finding]:
        """For what fails for root, and for others may be for want of root alone."""
        return fail if self.is_root else lambda found, _: warn(found, "run this as root")

    @cached_property
    def process(self) -> str:
        """Whose privileges and limits count: those of the agent that runs, or else our own, as those of one to come."""
        return "self" if self.agent is None else str(self.agent)

    @property
    def whose(self) -> str:
        return "this process" if self.process == "self" else f"the agent, process {self.process},"

    def may(self, capability: int) -> bool:
        """Whether that process has a capability, by its number."""
        match = _CAPABILITIES.search(self.read(f"proc/{self.process}/status") or "")
        return match is not None and bool(int(match[1], 16) >> capability & 1)

    def limit(self, name: str) -> int | None:
        """That process's limit, as its ``limits`` calls it; None for none."""
        for line in (self.read(f"proc/{self.process}/limits") or "").splitlines():
            if line.startswith(name):
                soft = line.removeprefix(name).split()[0]
                return None if soft == "unlimited" else int(soft)
        return None

    # -- what there is --------------------------------------------------------------------------------------------------

    @cached_property
    def functions(self) -> list[PciFunction]:
        return functions(self.sysfs)

    @cached_property
    def balloon(self) -> PciFunction | None:
        with suppress(DeviceNotFound):
            return find_balloon(self.options.device, self.functions)
        return None

    @cached_property
    def virtio(self) -> Path | None:
        """The virtio device that virtio-pci shows below the function, if it has it."""
        return None if self.balloon is None else next(self.balloon.path.glob("virtio[0-9]*"), None)

    @cached_property
    def drives(self) -> int | None:
        """The process that has the device."""
        if self.balloon is None:
            return None
        now, before = (self.root / folder.relative_to("/") for folder in (LOCK_DIR, OLD_LOCK_DIR))
        return who_drives(self.balloon.address, now, before, self.proc)

    @cached_property
    def owner(self) -> int | None:
        """The process whose the run directory is. PermissionError if only root can see."""
        return who_locks(run_dir_lock(self.options.run_dir), self.proc)

    @cached_property
    def agent(self) -> int | None:
        """The process whose the run directory is, if that can be told, or else the one that has the device."""
        with suppress(PermissionError):
            if self.owner is not None:
                return self.owner
        return self.drives

    @cached_property
    def status(self) -> dict[str, Any] | str:
        """What the agent says of itself, or why it does not."""
        if self.agent is None:
            return "no agent runs"
        try:
            return ask_status(self.options.run_dir / SOCKET_NAME, {"op": "status"}, STATUS_DEADLINE)
        except BalloonError as error:
            return str(error)
