"""The control socket: who may ask what, and how little a bad client can do."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from balloon_agent.api import control
from balloon_agent.api.client import ask, ask_status
from balloon_agent.api.control import Access, ControlServer, Peer
from balloon_agent.api.describe import describe
from balloon_agent.api.messages import (
    Answer,
    AnyRequest,
    Follow,
    Hold,
    Map,
    Next,
    Set,
    Statistics,
    Status,
    Wait,
    encode,
    schema,
)
from balloon_agent.api.snapshot import State
from balloon_agent.cli import balloonctl, commands
from balloon_agent.errors import BadInput, NotPermitted
from tests.unit.test_service import MIB, SNAPSHOT, FakeOwner

GROUP = 4711
LOOKING: list[AnyRequest] = [Status(), Wait(timeout=0), Next(after=-1, timeout=0), Statistics(), Map(cell_bytes=2 * MIB)]
CHANGING: list[AnyRequest] = [Set(size=4096), Follow(), Hold()]
ROOT = Peer(1, 0, frozenset({0}))
MEMBER = Peer(2, 1000, frozenset({1000, GROUP}))
STRANGER = Peer(3, 1001, frozenset({1001}))


def is_ok(answer: Answer | bytes) -> bool:
    told: bool = json.loads(answer if isinstance(answer, bytes) else encode(answer))["ok"]
    return told


class Served:
    """A server over a fake owner; ``make`` it anew with other options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = FakeOwner()
        self.path = folder / "control"
        self.server: ControlServer | None = None

    def make(self, access: Access | None = None) -> ControlServer:
        self.close()
        self.server = ControlServer(self.folder, self.owner.board, self.owner, lambda: {"free_memory": 7}, access or Access())
        self.server.start()
        return self.server

    def close(self) -> None:
        if self.server is not None:
            self.server.stop()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        connection.connect(str(self.path))
        return connection


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


@pytest.fixture
def with_group(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], ControlServer]:
    """A server for a group of this number."""

    class Group:
        gr_gid = GROUP

    monkeypatch.setattr("balloon_agent.api.control.grp.getgrnam", lambda _: Group)
    return lambda may_change: served.make(Access("operators", may_change=may_change))


def test_root_may_do_everything(served: Served) -> None:
    server = served.make()
    assert all(is_ok(server.perform(request, ROOT)) for request in LOOKING + CHANGING)


@pytest.mark.parametrize("peer", [MEMBER, STRANGER])
def test_nobody_else_may_do_anything_if_nobody_is_named(served: Served, peer: Peer) -> None:
    server = served.make()
    for request in LOOKING + CHANGING:
        with pytest.raises(NotPermitted, match=f"user {peer.uid} may not use"):
            server.perform(request, peer)
    assert served.owner.taken == []


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED HERE: only root can give a file to a group")
def test_a_group_may_look_and_if_root_says_so_change(with_group: Callable[[bool], ControlServer], served: Served) -> None:
    server = with_group(False)
    assert (served.path.stat().st_mode & 0o777, served.path.stat().st_gid) == (0o660, GROUP)
    assert served.folder.stat().st_mode & 0o777 == 0o710
    assert all(is_ok(server.perform(request, MEMBER)) for request in LOOKING)
    for request in CHANGING:
        with pytest.raises(NotPermitted, match="only look"):
            server.perform(request, MEMBER)
    assert served.owner.taken == []
    server = with_group(True)
    assert all(is_ok(server.perform(request, MEMBER)) for request in LOOKING + CHANGING)
    with pytest.raises(NotPermitted):
        server.perform(Status(), STRANGER)
    # Without a group, nobody but root gets to it any more.
    served.make()
    assert (served.path.stat().st_mode & 0o777, served.folder.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_kernel_says_who_a_client_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        peer = Peer.of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert {os.getgid(), *os.getgroups()} == peer.groups


def test_one_client_too_many_is_told_so_and_the_others_go_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlServer, "most_clients", 3)
    monkeypatch.setattr(control, "REQUEST_DEADLINE", 5.0)
    served.make()
    silent = [served.connect() for _ in range(3)]
    with served.connect() as connection:
        answer = json.loads(connection.makefile("rb").readline())
    assert "clients are here already" in answer["error"]
    silent.pop().close()
    # Its thread has to end first.
    deadline = threading.Event()
    for _ in range(100):
        try:
            assert ask(served.path, {"op": "status"}, 60)["ok"]
            break
        except BadInput:
            deadline.wait(0.05)
    else:
        pytest.fail("the place of a client that has gone is not free")
    for connection in silent:
        connection.close()


def test_others_do_not_keep_root_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlServer, "most_clients", 2)
    kinds = ["others", "others"]
    monkeypatch.setattr(ControlServer, "kind_of", lambda *_: kinds.pop() if kinds else "root")
    served.make()
    others = [served.connect() for _ in range(2)]
    assert ask(served.path, {"op": "status"}, 60)["ok"]
    for connection in others:
        connection.close()


def test_a_hundred_clients_at_once_are_all_answered(served: Served) -> None:
    served.make()
    connections = [served.connect() for _ in range(100)]
    for connection in connections:
        connection.sendall(b'{"op":"status"}\n')
    answers = [json.loads(connection.makefile("rb").readline()) for connection in connections]
    assert all(answer["status"]["pid"] == 42 for answer in answers)
    for connection in connections:
        connection.close()


def test_a_client_that_sends_little_by_little_has_no_more_time_for_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_DEADLINE", 0.3)
    served.make()

    def dribble(connection: socket.socket) -> None:
        for _ in range(1000):
            connection.sendall(b" ")
            threading.Event().wait(0.02)

    with served.connect() as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        dribble(connection)


def test_several_requests_come_in_one_go(served: Served) -> None:
    served.make()
    with served.connect() as connection:
        connection.sendall(b'{"op":"status"}\n{"op":"hold"}\n{"op":"sta')
        stream = connection.makefile("rb")
        assert json.loads(stream.readline())["status"]["mode"] == "follow"
        assert json.loads(stream.readline())["status"]["mode"] == "hold"
        connection.sendall(b'ts"}\n')
        assert json.loads(stream.readline())["stats"] == {"free_memory": 7}


def test_who_waits_and_hangs_up_keeps_no_thread(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LOOK_INTERVAL", 0.05)
    server = served.make()
    served.owner.board.publish(replace(SNAPSHOT, state=State.INFLATING))
    there = [True, True, False]
    answer = server.perform(Wait(timeout=600), ROOT, lambda: there.pop(0))
    assert (isinstance(answer, Answer) and answer.status is not None, there) == (True, [])


def test_the_next_snapshot_can_be_waited_for(served: Served) -> None:
    served.make()
    number = ask_status(served.path, {"op": "status"}, 60)["number"]
    answers: list[str] = []
    request = {"op": "next", "after": number, "timeout": 60}
    waiting = threading.Thread(target=lambda: answers.append(ask_status(served.path, request, 90)["state"]))
    waiting.start()
    served.owner.board.publish(replace(SNAPSHOT, state=State.INFLATING))
    waiting.join(60)
    assert answers == ["inflating"]


def test_the_schema_has_every_request() -> None:
    text = json.dumps(schema())
    assert all(f'"{name}"' in text for name in ("status", "wait", "next", "stats", "map", "set", "follow", "hold"))


# -- balloonctl's quick way ------------------------------------------------------------------------------------------------


def test_the_quick_way_says_what_the_long_one_does(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(balloonctl, "DEFAULT_RUN_DIR", str(served.folder))
    served.make()
    served.owner.board.publish(replace(SNAPSHOT, state=State.SHORT, shortfall='it said "no\\" ü\n\t☃'))
    for words in (["status"], ["status", "--json"]):
        quick = balloonctl.quick_status(words)
        assert quick is not None
        assert commands.main([*words, "--run-dir", str(served.folder)]) == 0
        assert capsys.readouterr().out == f"{quick}\n"
    assert balloonctl.quick_status(["status"]) == describe(served.owner.board.latest)
    assert json.loads(balloonctl.quick_status(["status", "--json"]) or "")["shortfall"] == 'it said "no\\" ü\n\t☃'


@pytest.mark.parametrize("words", [[], ["status", "--run-dir", "/x"], ["set", "1G"], ["status", "status"]])
def test_everything_else_goes_the_long_way(words: list[str]) -> None:
    assert balloonctl.quick_status(words) is None


@pytest.mark.parametrize("words", ["status", "status --run-dir {folder}", "stats --run-dir {folder}"])
def test_output_that_nobody_reads_or_takes_is_no_crash(served: Served, words: str) -> None:
    served.make()
    typed = words.format(folder=served.folder).split()
    program = (
        "import sys; from balloon_agent.cli import balloonctl; "
        f"balloonctl.DEFAULT_RUN_DIR = {str(served.folder)!r}; sys.exit(balloonctl.main({typed!r}))"
    )
    for redirection, code in (("| true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 1)):
        script = f"sleep 0.1; {sys.executable} -c {shlex.quote(program)} {redirection}"
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False, env=environment)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "ignored" not in done.stderr


def test_without_an_agent_the_long_way_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(balloonctl, "DEFAULT_RUN_DIR", str(tmp_path))
    assert balloonctl.quick_status(["status"]) is None


def test_status_says_what_was_freed_and_by_which_means() -> None:
    lines = describe(replace(SNAPSHOT, hidden_freed_bytes_total={"split": 397 << 20, "reclaim": 0})).splitlines()
    assert "hidden   397 MiB freed by split" in lines
    assert not [line for line in describe(SNAPSHOT).splitlines() if line.startswith("hidden")]
