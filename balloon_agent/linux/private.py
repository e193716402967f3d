"""Directories that nobody but root can put anything into: what lies in them is believed, and root's files are made in them.

Otherwise anybody could leave a lock, a record or a link there that the agent then believes or follows.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

# Modes that the agent gives its directories: closed, or open to the group of the control socket, which may pass through.
CLOSED, PASSABLE, READABLE = 0o700, 0o710, 0o755
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_PARENT_MODE = 0o755


def make(folder: Path) -> None:
    """Make ``folder``, closed, and the directories that it is in. One that is there stays as it is."""
    for each in (*reversed(folder.parents), folder):
        try:
            each.mkdir(mode=CLOSED if each == folder else _PARENT_MODE)
        except FileExistsError:
            continue


def obstacle(folder: Path) -> str | None:
    """The reason not to believe what is in ``folder``, or to put anything there: somebody else can change it, or replace it.

    Links count as well as where they lead to. In a directory that anybody may write to and that is sticky, such as /tmp, others
    cannot replace what is root's: there ``folder`` may lie, but not be it. What is not there yet is no obstacle.
    """
    owners = {0, os.geteuid()}
    target = folder.resolve()
    for each in dict.fromkeys((*reversed(folder.parents), folder, *reversed(target.parents), target)):
        try:
            found = each.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in owners:
            return f"{each} belongs to user {found.st_uid}, and not to root"
        if stat.S_ISLNK(found.st_mode):
            continue
        if not stat.S_ISDIR(found.st_mode):
            return f"{each} is no directory"
        if found.st_mode & _WRITABLE and (each == target or not found.st_mode & stat.S_ISVTX):
            return f"others than root may write to {each} (mode {stat.S_IMODE(found.st_mode):04o})"
    return None
