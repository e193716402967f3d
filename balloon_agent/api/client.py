"""The client's side of the control socket. Knows nothing of the agent's inside, and imports next to nothing."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from balloon_agent.errors import AgentUnreachable, BadInput

_TIMEVAL = struct.Struct("@ll")  # seconds and microseconds


def ask(path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One request's answer. AgentUnreachable if nobody answers in ``timeout`` seconds, BadInput with the agent's words."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            # A timeout of Python's own has the kernel refuse at once, with EAGAIN, where others are waiting to be let in.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(max(1, int(timeout)), 0))
            connection.connect(str(path))
            connection.settimeout(timeout)
            # Who is turned away is told why before that could be sent.
            with suppress(BrokenPipeError):
                connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise AgentUnreachable(f"no agent answers at {path}: start it with `balloon-agent run` (as root)") from error
    except PermissionError as error:
        raise AgentUnreachable(
            f"{path}: {error.strerror}: balloonctl must run as root, or in the group that the agent was told of"
        ) from error
    except OSError as error:
        raise AgentUnreachable(f"the agent at {path} does not answer: {error.strerror or error}") from error
    try:
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise BadInput(answer["error"])
    except (ValueError, KeyError, TypeError) as error:
        raise AgentUnreachable(f"the agent at {path} hung up without an answer") from error
    return answer


def ask_status(path: Path, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """As ``ask``: the status in the answer."""
    status: dict[str, Any] = ask(path, request, timeout)["status"]
    return status
