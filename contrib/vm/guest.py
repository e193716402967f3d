"""What runs inside the guest: starts commands for the harness and tells how they went.

It speaks newline-delimited JSON over its standard input and output, which virtme-ng connects to the host.
Requests: ``start`` (id, argv, env, stdin), ``signal`` (id, number), ``write`` (id, text: to its standard input),
``close`` (id: the end of that).
Events: ``ready``; ``started`` (id, pid); ``out`` and ``err`` (id, text) as output comes; ``exit`` (id, code).
When its input ends (the harness has gone), it ends too, and with it the machine.

It is careful with memory, which the guest has little of: no asyncio, no subprocess.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

CHUNK = 65536
# This program must outlive a guest that runs out of memory, and what it starts must not be protected like it.
PROTECTED = "-1000"
ORDINARY = ["/bin/sh", "-c", 'echo 0 >/proc/self/oom_score_adj; exec "$@"', "sh"]
INPUT, OUTPUT = 0, 1


def emit(**event: Any) -> None:
    data = json.dumps(event).encode() + b"\n"
    while data:
        data = data[os.write(OUTPUT, data) :]


class Command:
    """A running command: its pipes, and how it ended."""

    def __init__(self, number: int, request: dict[str, Any]) -> None:
        self.number = number
        stdin, self.stdin = os.pipe()
        out, stdout = os.pipe()
        err, stderr = os.pipe()
        try:
            self.pid = os.posix_spawnp(
                ORDINARY[0],
                [*ORDINARY, *request["argv"]],
                {**os.environ, **request.get("env", {})},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, stdin, 0),
                    (os.POSIX_SPAWN_DUP2, stdout, 1),
                    (os.POSIX_SPAWN_DUP2, stderr, 2),
                ],
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )
        except OSError:
            for fd in (self.stdin, out, err):
                os.close(fd)
            raise
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)
        self.outputs = {out: "out", err: "err"}
        self.pidfd = os.pidfd_open(self.pid)
        self.ended = False
        emit(event="started", id=number, pid=self.pid)
        os.write(self.stdin, request.get("stdin", "").encode())
        if not request.get("keep_stdin"):
            self.close_stdin()

    def close_stdin(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def forward(self, fd: int) -> None:
        """Pass output on; forget the pipe at its end."""
        data = os.read(fd, CHUNK)
        if data:
            emit(event=self.outputs[fd], id=self.number, text=data.decode("utf-8", "replace"))
        else:
            del self.outputs[fd]
            os.close(fd)

    def finish(self) -> None:
        """It has ended: what it printed goes out before its code, though its children may keep the pipes open."""
        for fd in list(self.outputs):
            os.set_blocking(fd, False)
            try:
                while fd in self.outputs:
                    self.forward(fd)
            except BlockingIOError:
                os.close(fd)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.close_stdin()
        self.ended = True
        emit(event="exit", id=self.number, code=os.waitstatus_to_exitcode(status))


def perform(request: dict[str, Any], commands: dict[int, Command]) -> None:
    number = request["id"]
    if request["op"] == "start":
        try:
            commands[number] = Command(number, request)
        except OSError as error:
            emit(event="err", id=number, text=f"{request['argv'][0]}: {error.strerror}\n")
            emit(event="exit", id=number, code=127)
    elif number not in commands:
        return  # it ended before we were asked
    elif request["op"] == "signal":
        os.kill(commands[number].pid, request["number"])
    elif request["op"] == "write":
        os.write(commands[number].stdin, request["text"].encode())
    elif request["op"] == "close":
        commands[number].close_stdin()


def main() -> int:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(PROTECTED)
    commands: dict[int, Command] = {}
    pending = b""
    # Before a reboot it may have been stopped in the middle of a line.
    os.write(OUTPUT, b"\n")
    emit(event="ready", pid=os.getpid())
    while True:
        poller = select.poll()
        poller.register(INPUT, select.POLLIN)
        owners: dict[int, Command] = {}
        for command in commands.values():
            for fd in (*command.outputs, command.pidfd):
                owners[fd] = command
                poller.register(fd, select.POLLIN)
        for fd, _ in poller.poll():
            if fd == INPUT:
                data = os.read(INPUT, CHUNK)
                if not data:
                    return 0
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    perform(json.loads(line), commands)
                continue
            command = owners[fd]
            if command.ended:
                continue
            if fd == command.pidfd:
                command.finish()
                del commands[command.number]
            elif fd in command.outputs:
                command.forward(fd)


if __name__ == "__main__":
    sys.exit(main())
