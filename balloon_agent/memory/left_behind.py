"""Holders and workers that an earlier agent has left: greeted all at once, or ended by process and waited for.

A socket's name ends with the number of the process that serves it. It does not if the agent was killed before it could rename
the socket, or is of a version that did not rename it: then the process is found by the socket itself. A number alone proves
nothing, since the kernel gives it to another process in time; so a process is killed only if its command line is that of a
holder of this folder, and by a pidfd that was opened before that was looked at.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from balloon_agent.holder.protocol import LineReader, encode
from balloon_agent.linux.process import is_readable

# On the command line of each holder, before its socket: agents of all versions know holders by it.
HOLDER = "balloon_agent.memory.holder"
_WORKER = "worker-"


# -- sockets and their processes ---------------------------------------------------------------------------------------


def rename(path: Path, pid: int, *, holds_memory: bool) -> Path:
    """Give a new holder's or worker's socket the name that says whose it is."""
    name = f"{_stem(path)}-{pid}" if holds_memory else f"{_WORKER}{pid}"
    return path if path.name == name else path.rename(path.with_name(name))


def is_worker(path: Path) -> bool:
    """Whether it is the socket of a process that holds nothing."""
    return path.name.startswith(_WORKER)


def sockets(folder: Path) -> list[Path]:
    """All that lie in ``folder``, served or not. None if there is no such folder."""
    with suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def is_served(path: Path) -> bool:
    """Whether the socket's process is there, or was killed and is not gone yet. The process is not asked anything."""
    found = _open_process(path)
    if found is None:
        return not is_worker(path) and bool(_inodes(path))
    os.close(found.pidfd)
    return True


def process_number(path: Path) -> int | None:
    """The number in a socket's name, or of the process that has the socket; None if there is neither."""
    _, separator, digits = path.name.rpartition("-")
    return int(digits) if separator and digits.isdecimal() else _owner(path)


def _stem(path: Path) -> str:
    """The name that a holder's socket was bound to. Renaming the file does not change what the kernel knows it by."""
    return path.name.partition("-")[0]


def _inodes(path: Path) -> set[str]:
    """The numbers of the sockets that are bound to ``path`` and open. Source: unix_seq_show() in net/unix/af_unix.c."""
    stem = _stem(path)
    found = set()
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        *_, inode, name = line.split(maxsplit=7)
        if name.endswith(f"/{stem}") and Path(name).parent.resolve() == path.parent.resolve():
            found.add(inode)
    return found


def _owner(path: Path) -> int | None:
    links = {f"socket:[{inode}]" for inode in _inodes(path)}
    if not links:
        return None
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and _is_holder(int(process.name), path.parent) and links & set(_open_files(process)):
            return int(process.name)
    return None


def _open_files(process: Path) -> Iterator[str]:
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for fd in (process / "fd").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                yield os.readlink(fd)


def _is_holder(pid: int, folder: Path) -> bool:
    """Whether a process is a holder or worker of ``folder``, or is on its way out. A fork has its parent's command line."""
    with suppress(FileNotFoundError, ProcessLookupError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if HOLDER.encode() in words:
            path = Path(os.fsdecode(words[words.index(HOLDER.encode()) + 1]))
            return path.parent.resolve() == folder.resolve()
        # Its first thread has ended and has no words any more; another one may keep the address space (see ``outlasting``).
        return words == [b""] and Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "Z"
    return False


class _Process(NamedTuple):
    pid: int
    pidfd: int


def _open_process(path: Path) -> _Process | None:
    """The process behind a socket, if it has not ended yet. The caller closes its pidfd."""
    pid = process_number(path)
    if pid is None:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # While the pidfd says that its process has not ended, its number cannot have become another's.
    if _is_holder(pid, path.parent) and not is_readable(pidfd, 0):
        return _Process(pid, pidfd)
    os.close(pidfd)
    return None


# -- greeting and ending -----------------------------------------------------------------------------------------------


class Greeted(NamedTuple):
    """A holder that has answered: its socket, a connection that is the caller's to close, and its answer."""

    path: Path
    connection: socket.socket
    hello: dict[str, Any]


def greet(paths: Sequence[Path], seconds: float, waking: int | None = None) -> tuple[list[Greeted], list[Path]]:
    """Say hello to the holders at these sockets, all at once, and wait for their answers under one deadline.

    Returns those that have answered, and the sockets of the others: silent, or dead. The wait ends when ``waking`` is readable.
    """
    greeted: list[Greeted] = []
    silent: list[Path] = []
    waiting: dict[int, tuple[Path, socket.socket, LineReader]] = {}
    poller = select.poll()
    if waking is not None:
        poller.register(waking, select.POLLIN)
    try:
        for path in paths:
            connection = _say_hello(path)
            if connection is None:
                silent.append(path)
                continue
            waiting[connection.fileno()] = path, connection, LineReader(connection)
            poller.register(connection, select.POLLIN)
        end = time.monotonic() + seconds
        is_woken = False
        while waiting and not is_woken and (ready := poller.poll(max(0.0, end - time.monotonic()) * 1000)):
            for fd in (fd for fd, _ in ready):
                if fd == waking:
                    is_woken = True
                    continue
                path, connection, reader = waiting[fd]
                try:
                    hello = reader.read()
                except BlockingIOError:
                    continue  # a long answer, of which this was a part
                except (OSError, ValueError):
                    hello = None
                poller.unregister(fd)
                del waiting[fd]
                if hello is None:
                    connection.close()
                    silent.append(path)
                else:
                    greeted.append(Greeted(path, connection, hello))
    except BaseException:
        for each in greeted:
            each.connection.close()
        raise
    finally:
        for path, connection, _ in waiting.values():
            connection.close()
            silent.append(path)
    return greeted, silent


def _say_hello(path: Path) -> socket.socket | None:
    """A connection on which hello was said, that blocks nobody; None where nobody listens, or too many wait already."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(str(path))
        connection.sendall(encode({"op": "hello"}))
    except OSError:
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def end(paths: Sequence[Path], seconds: float) -> tuple[list[int], list[Path]]:
    """Kill the processes behind these sockets, and wait for all of them under one deadline.

    What they held is the guest's then: nobody must be about to discard it. Returns the numbers of those that have ended, and
    the sockets that are served yet; the others' are removed.
    """
    killed: list[_Process] = []
    try:
        for path in paths:
            found = _open_process(path)
            if found is not None:
                killed.append(found)
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(found.pidfd, signal.SIGKILL)
        deadline = time.monotonic() + seconds
        ended = [each.pid for each in killed if is_readable(each.pidfd, deadline - time.monotonic())]
    finally:
        for each in killed:
            os.close(each.pidfd)
    left = [path for path in paths if is_served(path)]
    for path in paths:
        if path not in left:
            path.unlink(missing_ok=True)
    return ended, left
