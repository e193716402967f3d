"""What an earlier agent has left: who is found behind a socket, who is greeted, who is ended, and who is left alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from balloon_agent.holder.protocol import UNDERSTOOD, VERSION
from balloon_agent.memory import left_behind
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.left_behind import HOLDER

# Listens as a holder does. What it answers to each line is its last argument; without one it is silent.
PROGRAM = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen(4)
print(flush=True)
while sys.argv[3:]:
    connection, _ = listener.accept()
    while connection.recv(100):
        connection.sendall(sys.argv[3].replace("PID", str(os.getpid())).encode() + b"\\n")
time.sleep(600)
"""
Start = Callable[..., subprocess.Popen[bytes]]


def hello(version: int = VERSION, **others: object) -> str:
    return json.dumps({"ok": True, "version": version, "pid": "PID", "extents": [], **others}).replace('"PID"', "PID")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "holders"
    folder.mkdir()
    return folder


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that listens at a path, and looks like a holder unless it is said to be something else."""
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path, *answer: str, looks_like: str = HOLDER) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, looks_like, str(path), *answer], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_holder_that_answers_is_adopted_under_a_name_that_says_whose_it_is(folder: Path, start: Start) -> None:
    process = start(folder / "0a1b2c3d", hello())
    holders = Holders(folder)
    (client,) = holders.adopt()
    assert (client.name, client.pid, client.is_older) == (f"0a1b2c3d-{process.pid}", process.pid, False)
    assert [path.name for path in folder.iterdir()] == [client.name]
    assert holders.end_unclaimed() == []
    assert left_behind.is_served(folder / client.name)
    client.close()


@pytest.mark.parametrize("version", UNDERSTOOD[:-1])
def test_a_holder_of_a_version_before_keeps_what_it_has_and_takes_no_more(folder: Path, start: Start, version: int) -> None:
    start(folder / "0a1b2c3d", hello(version))
    holders = Holders(folder)
    (client,) = holders.adopt()
    assert client.is_older
    new = holders.start()
    try:
        assert new.request({"op": "hello"})["version"] == VERSION, "it was forked off the older one"
    finally:
        holders.kill(new.name)
        client.close()


@pytest.mark.parametrize(
    "answer", [(), (hello(99),), (hello(3),), ("[]",), ("{}",), (f'{{"ok": true, "version": {VERSION}}}',)]
)
@pytest.mark.parametrize("name", ["0a1b2c3d", "0a1b2c3d-{}"])
def test_a_holder_that_is_silent_or_not_understood_is_ended_and_only_then_forgotten(
    folder: Path, start: Start, answer: tuple[str, ...], name: str
) -> None:
    """By its number in the socket's name; or as an agent left it that gave its sockets no such names."""
    process = start(folder / "0a1b2c3d", *answer)
    path = (folder / "0a1b2c3d").rename(folder / name.format(process.pid))
    holders = Holders(folder)
    assert holders.adopt(seconds=0.2) == []
    # Nothing was done to it yet: there may be a device that acts on what it holds.
    assert process.poll() is None
    assert path.exists()
    assert holders.end_unclaimed() == []
    assert process.wait(60) == -9
    assert list(folder.iterdir()) == []


def test_nobody_is_killed_for_having_a_holders_number(folder: Path, start: Start, tmp_path: Path) -> None:
    """A stranger; and a holder of another agent's."""
    stranger = start(tmp_path / "stranger", looks_like="somebody.else")
    (tmp_path / "other").mkdir()
    others = start(tmp_path / "other" / "11111111")
    paths = [folder / f"0a1b2c3d-{stranger.pid}", folder / f"0a1b2c3e-{others.pid}", folder / f"worker-{stranger.pid}"]
    for path in paths:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    assert not any(left_behind.is_served(path) for path in paths)
    holders = Holders(folder)
    assert holders.adopt() == []
    assert holders.end_unclaimed() == []
    assert stranger.poll() is others.poll() is None
    # Their processes are gone, and so are they.
    assert list(folder.iterdir()) == []


def test_what_cannot_be_ended_stays_and_is_told_of(folder: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that does not come back from the kernel. Here it is one that cannot be told from a stranger."""
    process = start(folder / "0a1b2c3d", looks_like="somebody.else")
    holders = Holders(folder)
    assert holders.adopt(seconds=0.1) == []
    (problem,) = holders.end_unclaimed()
    assert "cannot be ended: what it holds is missing until it is gone" in problem
    assert str(folder / "0a1b2c3d") in problem
    assert process.poll() is None
    assert left_behind.is_served(folder / "0a1b2c3d")
    process.kill()
    process.wait()
    assert holders.end_unclaimed() == []
    assert list(folder.iterdir()) == []


def test_many_silent_holders_are_waited_for_together(folder: Path, start: Start) -> None:
    each, many = 0.5, 12
    for number in range(many):
        start(folder / f"{number:08x}")
    answering = start(folder / "ffffffff", hello())
    holders = Holders(folder)
    begin = time.monotonic()
    (client,) = holders.adopt(seconds=each)
    assert client.pid == answering.pid
    assert time.monotonic() - begin < each * many, "one after the other"
    assert holders.end_unclaimed() == []
    assert [path.name for path in folder.iterdir()] == [client.name]
    client.close()


def test_who_wants_to_stop_does_not_wait_for_silent_holders(folder: Path, start: Start) -> None:
    process = start(folder / "0a1b2c3d")
    waking = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        # Until the end of time, if it were not for the signal.
        assert Holders(folder).adopt(seconds=1e6, waking=waking) == []
    finally:
        os.close(waking)
    assert process.poll() is None


def test_a_long_answer_may_come_in_parts(folder: Path, start: Start) -> None:
    extents = [{"name": f"thp-{number}", "source": "thp", "pin": 3, "pieces": [[0, number, 1]] * 50} for number in range(150)]
    start(folder / "0a1b2c3d", hello(extents=extents))
    (client,) = Holders(folder).adopt()
    assert client.extents == extents
    client.close()
