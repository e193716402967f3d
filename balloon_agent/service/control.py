"""The control socket: newline-delimited JSON over a unix socket that only root can reach.

Requests: ``{"op": "status"}``, ``{"op": "set", "size": BYTES}``, ``{"op": "follow"}``, ``{"op": "hold"}``, and
``{"op": "wait", "timeout": S}`` for the balloon to come to rest. Each is answered with one line:
``{"ok": true, "status": {...}}``, or ``{"ok": false, "error": "..."}``.
The threads here only read snapshots and leave commands for the owner thread.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balloon_agent.errors import AgentUnreachable, BadInput, BalloonError

from .serving import serve_in_thread
from .snapshot import Board, Snapshot

SOCKET_NAME = "control"
LONGEST_REQUEST = 4096
IDLE_DEADLINE = 30.0  # seconds a client may take over one request
LONGEST_WAIT = 3600.0
# ``command(mode, size)`` hands a change to the owner thread and returns its number; BadInput if it makes no sense.
Command = Callable[[str, int | None], int]


class _Handler(socketserver.StreamRequestHandler):
    timeout = IDLE_DEADLINE
    server: ControlServer

    def handle(self) -> None:
        try:
            while line := self.rfile.readline(LONGEST_REQUEST):
                if not line.endswith(b"\n"):
                    self._reply({"ok": False, "error": f"a request is one line of at most {LONGEST_REQUEST} bytes"})
                    return
                self._reply(self._answer(line))
        except (TimeoutError, ConnectionError):
            return  # a client that went away, or does not speak: nobody else is kept waiting by it

    def _reply(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise BadInput("a request is a JSON object")
            return {"ok": True, "status": self.server.perform(request).as_dict()}
        except (ValueError, RecursionError) as error:
            return {"ok": False, "error": f"a request is a line of JSON: {error}"}
        except BalloonError as error:
            return {"ok": False, "error": str(error)}


class ControlServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Listens at ``folder``/control from construction on; ``start`` begins to answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, board: Board, command: Command) -> None:
        self.path = folder / SOCKET_NAME
        self._board = board
        self._command = command
        self._stop: Callable[[], None] = self.server_close
        # Whoever holds the device lock is the only agent: a socket that is there is a dead one's.
        self.path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            super().__init__(str(self.path), _Handler)
        finally:
            os.umask(before)

    def start(self) -> None:
        self._stop = serve_in_thread(self, "control")

    def stop(self) -> None:
        self._stop()
        self.path.unlink(missing_ok=True)

    def perform(self, request: dict[str, Any]) -> Snapshot:
        """Carry out one request, and return the snapshot to answer with. BadInput for one that makes no sense."""
        match request:
            case {"op": "status"}:
                return self._board.latest
            case {"op": "set", "size": int(size)} if not isinstance(size, bool):
                return self._changed(self._command("manual", size))
            case {"op": "follow" | "hold" as mode}:
                return self._changed(self._command(mode, None))
            case {"op": "wait", "timeout": int() | float() as timeout} if 0 <= timeout <= LONGEST_WAIT:
                return self._board.wait_for(lambda snapshot: snapshot.at_rest, timeout)
        raise BadInput(
            f"unknown request {str(request)[:200]}: "
            f"known are status, set (size), follow, hold, wait (timeout up to {LONGEST_WAIT:g})"
        )

    def _changed(self, number: int) -> Snapshot:
        """The first snapshot in which command ``number`` has been taken up."""
        snapshot = self._board.wait_for(lambda snapshot: snapshot.commands_done >= number, IDLE_DEADLINE)
        if snapshot.commands_done < number:
            raise BalloonError(f"the agent is busy with {snapshot.state}: the command waits its turn, see balloonctl status")
        return snapshot


def ask(path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The client's side: one request's status. AgentUnreachable if nobody answers, BalloonError with the agent's words."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise AgentUnreachable(f"no agent answers at {path}: start it with `balloon-agent run` (as root)") from error
    except PermissionError as error:
        raise AgentUnreachable(f"{path}: {error.strerror}: balloonctl must run as root") from error
    except OSError as error:
        raise AgentUnreachable(f"the agent at {path} does not answer: {error.strerror or error}") from error
    if not line:
        raise AgentUnreachable(f"the agent at {path} hung up without an answer")
    answer = json.loads(line)
    if not answer["ok"]:
        raise BadInput(answer["error"])
    status: dict[str, Any] = answer["status"]
    return status
