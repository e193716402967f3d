"""The control socket: newline-delimited JSON over a unix socket, as ``messages`` has it.

Only root can reach it, and a group if root has named one; who it is the kernel says. The threads here only read snapshots and
leave commands for the owner thread.
"""

from __future__ import annotations

import grp
import logging
import os
import select
import socket
import socketserver
import stat
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from balloon_agent.errors import BalloonError, NotPermitted
from balloon_agent.linux import private
from balloon_agent.paths import SOCKET_NAME
from balloon_agent.sizing.governor import Mode

from .describe import describe
from .messages import (
    Answer,
    AnyRequest,
    Change,
    Follow,
    Hold,
    Map,
    Next,
    Set,
    Statistics,
    Status,
    Wait,
    decode,
    encode,
)
from .snapshot import Board, Snapshot
from .threads import BoundedThreads, serve_in_thread

LONGEST_REQUEST = 4096
REQUEST_DEADLINE = 30.0  # seconds a client may take over one request, and over its answer
MOST_CLIENTS = 128
# While a client waits it is looked for so often: one that has gone does not keep a thread.
LOOK_INTERVAL = 5.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS = 59
# Bytes, 4 for each group: more Python does not ask for. Of who is in more groups than that only the first counts.
_MOST_GROUPS = 1024
_log = logging.getLogger(__name__)


class Owner(Protocol):
    """What the owner thread does for clients."""

    def command(self, mode: Mode, size: int | None) -> int:
        """Leave a change, and return its number. BadInput if it makes no sense."""
        ...

    def locate(self, cell_bytes: int) -> bytes:
        """How much of each piece of memory of that size is in the balloon: the line to answer. BadInput if it is too long."""
        ...


@dataclass(frozen=True)
class Access:
    """Which group may use the socket beside root, and whether it may change anything."""

    group: str | None = None
    may_change: bool = False


@dataclass(frozen=True)
class Peer:
    """Who a client is, by the kernel's word."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(data)
        groups = b""
        with suppress(OSError):
            groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS)
        return cls(pid, uid, frozenset({gid, *struct.unpack(f"{len(groups) // 4}i", groups)}))

    @property
    def is_root(self) -> bool:
        """Root, or the user of this process, which is root but for a test."""
        return self.uid in (0, os.geteuid())


class _Handler(socketserver.BaseRequestHandler):
    server: ControlServer
    request: socket.socket

    def handle(self) -> None:
        self.peer = Peer.of(self.request)
        self._read = b""
        # A client that goes away, or does not speak, or does not listen, keeps nobody else waiting.
        with suppress(TimeoutError, ConnectionError):
            while line := self._line():
                if not line.endswith(b"\n"):
                    self._reply(Answer(ok=False, error=f"a request is one line of at most {LONGEST_REQUEST} bytes"))
                    return
                self._reply(self._answer(line))

    def _line(self) -> bytes:
        """A line with its end; less than that if it is too long, or if the client has said all."""
        deadline = time.monotonic() + REQUEST_DEADLINE
        while b"\n" not in self._read[:LONGEST_REQUEST]:
            if len(self._read) >= LONGEST_REQUEST:
                return self._read
            self.request.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.request.recv(LONGEST_REQUEST)
            if not data:
                return b""
            if time.monotonic() >= deadline:
                raise TimeoutError
            self._read += data
        line, end, self._read = self._read.partition(b"\n")
        return line + end

    def _reply(self, answer: Answer | bytes) -> None:
        self.request.settimeout(REQUEST_DEADLINE)
        self.request.sendall(answer if isinstance(answer, bytes) else encode(answer))

    def _answer(self, line: bytes) -> Answer | bytes:
        try:
            return self.server.perform(decode(line), self.peer, self._is_there)
        except (ValueError, RecursionError) as error:
            text = str(error).replace("\n", " ")
            return Answer(ok=False, error=f"that is no request: {text}; balloonctl schema shows what is")
        except BalloonError as error:
            return Answer(ok=False, error=str(error))

    def _is_there(self) -> bool:
        poller = select.poll()
        poller.register(self.request, select.POLLRDHUP)
        return not poller.poll(0)


class ControlServer(BoundedThreads, socketserver.UnixStreamServer):
    """Listens at ``folder``/control from construction on; ``start`` begins to answer."""

    request_queue_size = 128
    most_clients = MOST_CLIENTS

    def __init__(
        self,
        folder: Path,
        board: Board,
        owner: Owner,
        statistics: Callable[[], Mapping[str, int]] = dict,
        access: Access = Access(),
    ) -> None:
        self.path = folder / SOCKET_NAME
        self._board = board
        self._owner = owner
        self._statistics = statistics
        self._access = access
        self._group = None if access.group is None else grp.getgrnam(access.group).gr_gid
        self._stop: Callable[[], None] = self.server_close
        # Whoever holds the device lock is the only agent: a socket that is there is a dead one's.
        self.path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            super().__init__(str(self.path), _Handler)
        finally:
            os.umask(before)
        group = os.getegid() if self._group is None else self._group
        self._admit(folder, group)
        # Root, but for a test.
        os.chown(self.path, os.geteuid(), group)
        self.path.chmod(0o600 if self._group is None else 0o660)

    def _admit(self, folder: Path, group: int) -> None:
        """A group must get to the socket, and sees no more of the folder than that. One with other modes stays as it is."""
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode in (private.CLOSED, private.PASSABLE):
            os.chown(folder, os.geteuid(), group)
            folder.chmod(private.CLOSED if self._group is None else private.PASSABLE)
        elif self._group is not None and not mode & stat.S_IXOTH:
            _log.warning(
                "%s has mode %04o, and stays so: whether group %s gets to the socket in it is not the agent's doing",
                folder,
                mode,
                self._access.group,
            )

    def start(self) -> None:
        self._stop = serve_in_thread(self, "control")

    def stop(self) -> None:
        self._stop()
        self.path.unlink(missing_ok=True)

    def kind_of(self, request: socket.socket) -> str:
        return "root" if Peer.of(request).is_root else "others"

    def turn_away(self, request: socket.socket) -> None:
        request.setblocking(False)
        request.send(encode(Answer(ok=False, error=f"{MOST_CLIENTS} clients are here already: try again later")))

    def perform(self, request: AnyRequest, peer: Peer, is_there: Callable[[], bool] = lambda: True) -> Answer | bytes:
        """Carry out one request. NotPermitted for who may not, BadInput for what makes no sense. A map comes encoded."""
        self._check(request, peer)
        match request:
            case Status(show=None):
                return Answer(ok=True, status=self._board.latest)
            case Status(show="words"):
                return Answer(ok=True, text=describe(self._board.latest))
            case Status():
                return Answer(ok=True, text=msgspec.json.format(msgspec.json.encode(self._board.latest), indent=2).decode())
            case Statistics():
                return Answer(ok=True, stats=dict(self._statistics()))
            case Map(cell_bytes=size):
                return self._owner.locate(size)
            case Wait(timeout=timeout):
                return self._wait(lambda snapshot: snapshot.state.at_rest, timeout, is_there)
            case Next(after=after, timeout=timeout):
                return self._wait(lambda snapshot: snapshot.number > after, timeout, is_there)
            case Set(size=size):
                return self._change(Mode.MANUAL, size, peer)
            case Follow():
                return self._change(Mode.FOLLOW, None, peer)
            case Hold():
                return self._change(Mode.HOLD, None, peer)

    def _check(self, request: AnyRequest, peer: Peer) -> None:
        if peer.is_root:
            return
        if self._group is None or self._group not in peer.groups:
            raise NotPermitted(f"user {peer.uid} may not use this socket: root may, and the group of --control-group")
        if isinstance(request, Change) and not self._access.may_change:
            raise NotPermitted(
                f"user {peer.uid} may only look: root may change it, and with --control-group-may change its group"
            )

    def _wait(self, wanted: Callable[[Snapshot], bool], timeout: float, is_there: Callable[[], bool]) -> Answer:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            snapshot = self._board.wait_for(wanted, max(0.0, min(left, LOOK_INTERVAL)))
            if wanted(snapshot) or left <= LOOK_INTERVAL or not is_there():
                return Answer(ok=True, status=snapshot)

    def _change(self, mode: Mode, size: int | None, peer: Peer) -> Answer:
        """The first snapshot in which the command has been taken up."""
        number = self._owner.command(mode, size)
        _log.info("process %d of user %d asks: %s%s", peer.pid, peer.uid, mode, "" if size is None else f" {size} bytes")
        snapshot = self._board.wait_for(lambda snapshot: snapshot.commands_done >= number, REQUEST_DEADLINE)
        if snapshot.commands_done < number:
            raise BalloonError(f"the agent is busy with {snapshot.state}: the command waits its turn, see balloonctl status")
        return Answer(ok=True, status=snapshot)
