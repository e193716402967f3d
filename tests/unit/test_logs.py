"""A log that nobody reads keeps nobody waiting."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from balloon_agent.agent.logs import MOST_BYTES, MOST_LINES, PatientHandler


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def log(handler: logging.Handler, *lines: str) -> None:
    for line in lines:
        handler.handle(logging.LogRecord("x", logging.INFO, "x", 1, line, None, None))


def read(fd: int) -> list[str]:
    """All that there is to read."""
    os.set_blocking(fd, False)
    found = b""
    try:
        while data := os.read(fd, 65536):
            found += data
    except BlockingIOError:
        pass
    return found.decode().splitlines()


def test_lines_come_as_they_are_logged(pipe: tuple[int, int]) -> None:
    handler = PatientHandler(pipe[1])
    log(handler, "one", "two\u2026")
    assert read(pipe[0]) == ["one", "two\u2026"]


def test_a_log_that_is_not_read_keeps_nobody_waiting(pipe: tuple[int, int]) -> None:
    handler = PatientHandler(pipe[1])
    lines = [f"{number} {'x' * 100}" for number in range(MOST_LINES + 2000)]
    log(handler, *lines)
    found = read(pipe[0])
    assert found == lines[: len(found)]
    assert handler.lost == len(lines) - len(found) - MOST_LINES
    lost = handler.lost
    # The reader is back: what was kept comes with the next line, in order.
    log(handler, "next")
    while more := read(pipe[0]):
        found += more
        handler.flush()
    kept = len(found) - 1
    assert found[:kept] == lines[:kept]
    assert found[kept] == f"balloon-agent: {lost + 1} more lines were not written: nobody read them"
    log(handler, "after that")
    assert read(pipe[0]) == ["after that"]


def test_what_is_there_for_one_line_is_there_for_a_long_one(pipe: tuple[int, int]) -> None:
    """A pipe that has room for a page, and no more."""
    os.set_blocking(pipe[1], False)
    while True:
        try:
            os.write(pipe[1], bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(pipe[1], True)
    os.read(pipe[0], 4096)
    handler = PatientHandler(pipe[1])
    log(handler, "y" * 10000, "z" * 10000)
    text = os.read(pipe[0], 1 << 20)
    assert text.lstrip(b"\0") == b"y" * (MOST_BYTES - 1) + b"\n"


def test_a_socket_that_is_not_read_keeps_nobody_waiting() -> None:
    """As the journal's."""
    here, there = socket.socketpair()
    with here, there:
        handler = PatientHandler(here.fileno())
        log(handler, *("x" * 1000 for _ in range(5000)))
        assert handler.lost


def test_nobody_at_the_other_end_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    handler = PatientHandler(writing)
    log(handler, *("x" for _ in range(10)))
    handler.flush()
    os.close(writing)


PROGRAM = """
import logging
from balloon_agent.agent.logs import to_stderr
logging.basicConfig(level=logging.INFO, handlers=[to_stderr()], format="%(message)s")
for number in range(20000):
    logging.info("%d %s", number, "x" * 50)
print("done", flush=True)
"""


def test_a_program_ends_though_nobody_reads_its_log() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    assert process.wait(60) == 0
    _, log = process.communicate()
    assert log.startswith("0 xxx")
