"""What was changed outside this process, written down before it is changed: a small file under /run.

An agent that dies leaves it to the next one, which then knows whose the device was and which blocks are the balloon's.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from balloon_agent.errors import BalloonError
from balloon_agent.guest.shared_sysctls import Changed, SharedSettings
from balloon_agent.sizing.governor import Mode

from .lock import LOCK_DIR

# What an older version lacks was not changed by it. A newer one may mean something else by the same words: see ``is_foreign``.
_VERSION = 2


class StateFile:
    """The file, and its content. Every change is on disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = str(path.with_suffix(".part"))
        self.previous_drivers: dict[str, str | None] = {}
        self.blocks: dict[int, str] = {}  # number: zone
        # Settings of the kernel's by their name below /proc/sys, with dots: what they were, and what they were made.
        self.sysctls: dict[str, Changed] = {}
        # Bytes of the huge pages of a pool: how many there were, and how many were added.
        self.pools: dict[int, tuple[int, int]] = {}
        # What somebody has asked for: the governor's mode, and the size that goes with it. It goes when all else is undone.
        self.wish: tuple[Mode, int] | None = None
        # It was written by a newer version: what is on record is to be undone, and not gone on with.
        self.is_foreign = False
        try:
            content = json.loads(path.read_text())
            self.is_foreign = int(content["version"]) > _VERSION
            self.previous_drivers = dict(content["previous_drivers"])
            self.blocks = {int(number): str(zone) for number, zone in content["blocks"].items()}
            written = content.get("sysctls_written", {})
            self.sysctls = {
                str(name): Changed(int(value), tuple(map(int, written.get(name, ()))))
                for name, value in content.get("sysctls", {}).items()
            }
            pools = content.get("pools", {})
            self.pools = {int(size): (int(pool["before"]), int(pool["added"])) for size, pool in pools.items()}
            wish = content.get("wish")
            self.wish = None if wish is None or self.is_foreign else (_mode(wish["mode"]), int(wish["size"]))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BalloonError(
                f"{path} is damaged ({error!r})",
                "look for offline blocks in /sys/devices/system/memory, at nr_hugepages and vm.min_free_kbytes, then remove it",
            ) from error

    def record_driver(self, address: str, driver: str | None) -> None:
        """The device at ``address`` is about to be taken from ``driver``."""
        self._change(previous_drivers={**self.previous_drivers, address: driver})

    def forget_driver(self, address: str) -> None:
        """The device is back where it was."""
        self._change(previous_drivers={known: driver for known, driver in self.previous_drivers.items() if known != address})

    def record_blocks(self, zones: Mapping[int, str]) -> None:
        """Memory blocks are about to be taken out of their zones."""
        self._change(blocks={**self.blocks, **zones})

    def forget_blocks(self, numbers: Collection[int]) -> None:
        """The blocks are back."""
        self._change(blocks={number: zone for number, zone in self.blocks.items() if number not in numbers})

    def record_pool(self, size: int, before: int, added: int) -> None:
        """The pool of huge pages of ``size`` bytes had ``before`` of them; ``added`` are about to be, or are, added to it."""
        others = {known: pool for known, pool in self.pools.items() if known != size}
        self._change(pools=others | ({size: (before, added)} if added else {}))

    def record_sysctl(self, name: str, changed: Changed | None) -> None:
        """A setting of the kernel's is about to be changed, as it says; or with None, is as it was."""
        others = {known: value for known, value in self.sysctls.items() if known != name}
        self._change(sysctls=others if changed is None else others | {name: changed})

    def record_wish(self, mode: Mode, size: int) -> None:
        """Somebody has asked for this; an agent that comes after this one is to go on with it."""
        self._change(wish=(mode, size))

    def shared_settings(self, folder: Path = LOCK_DIR) -> SharedSettings:
        """What the agent with this record, and others on this machine, want of the kernel's settings."""
        return SharedSettings(folder / "balloon-agent-sysctls.lock", str(self._path.parent))

    @property
    def empty(self) -> bool:
        """Whether nothing is changed."""
        return not (self.previous_drivers or self.blocks or self.pools or self.sysctls)

    def _change(self, **changed: Any) -> None:
        """Here as in the file, or in neither: OSError."""
        before = {name: getattr(self, name) for name in changed}
        if before == changed:
            return
        self.__dict__.update(changed)
        try:
            self._write()
        except BaseException:
            self.__dict__.update(before)
            raise

    def _write(self) -> None:
        if self.empty:
            self.wish = None
            self._path.unlink(missing_ok=True)
            return
        content = {
            "version": _VERSION,
            "previous_drivers": self.previous_drivers,
            "blocks": self.blocks,
            "sysctls": {name: changed.before for name, changed in self.sysctls.items()},
            "sysctls_written": {name: changed.written for name, changed in self.sysctls.items()},
            "pools": {size: {"before": before, "added": added} for size, (before, added) in self.pools.items()},
            "wish": None if self.wish is None else {"mode": self.wish[0], "size": self.wish[1]},
        }
        # A rename is whole or not at all, so that a death in the middle leaves the old content. This is done at every step.
        data = json.dumps(content).encode() + b"\n"
        fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            if (written := os.write(fd, data)) != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes could be written", self._part)
        finally:
            os.close(fd)
        os.rename(self._part, self._path)


def _mode(word: str) -> Mode:
    """The host's target is followed where the word is none of this version's."""
    return Mode(word) if word in {*Mode} else Mode.FOLLOW
