"""What systemd is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from balloon_agent.agent.systemd import Notifier
from balloon_agent.balloon import device
from balloon_agent.memory import holder_client
from balloon_agent.memory.sources import blocks, hugetlb
from balloon_agent.virtio.device import RESET_DEADLINE


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


def heard(systemd: socket.socket) -> str:
    return systemd.recv(4096).decode()


def test_states_are_told(systemd: socket.socket, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "OTHER": "1"}
    notifier = Notifier(environment)
    assert environment == {"OTHER": "1"}, "what this process starts has nothing to say there"
    notifier.ready()
    assert heard(systemd) == "READY=1"
    notifier.status("the balloon has 4 MiB")
    assert heard(systemd) == "STATUS=the balloon has 4 MiB"
    notifier.reloading()
    first, second = heard(systemd).split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0
    notifier.stopping()
    assert heard(systemd) == "STOPPING=1"


def test_names_that_are_no_paths_are_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0balloon-agent-test")
        listener.settimeout(60)
        Notifier({"NOTIFY_SOCKET": "@balloon-agent-test"}).alive()
        assert heard(listener) == "WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({}, None),
    ],
)
def test_it_is_said_twice_as_often_as_is_watched_for(environment: dict[str, str], interval: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x", **environment}, pid=7).watchdog == interval


def test_a_wait_is_announced_if_that_is_due(systemd: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(3600 * 10**6)})
    for _ in range(3):
        notifier.beat()
    notifier.ready()
    assert [heard(systemd), heard(systemd)] == ["WATCHDOG=1", "READY=1"]
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).beat()
    notifier.ready()
    assert heard(systemd) == "READY=1"


def test_nothing_is_waited_for_longer_than_is_watched_for() -> None:
    """What was due just after a wait had begun is said after it: with all of it, the longest silence."""
    unit = (Path(__file__).parents[2] / "deploy/systemd/balloon-agent.service").read_text()
    watched = int(unit.split("WatchdogSec=")[1].split()[0])
    waits = (
        holder_client.START_DEADLINE,
        holder_client.ANSWER_DEADLINE,
        blocks.OFFLINE_DEADLINE + blocks.BLOCKS_A_STEP,
        hugetlb.GROW_DEADLINE,
        device.ANSWER_DEADLINE,
        RESET_DEADLINE,
    )
    assert watched / 2 + max(waits) < watched


def test_nobody_need_listen(tmp_path: Path) -> None:
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert Notifier({"WATCHDOG_USEC": "1000"}).watchdog is None
