"""Memory demand as the running kernel tells of it."""

from __future__ import annotations

import select
from pathlib import Path

import pytest

from balloon_agent.errors import NotPermitted
from balloon_agent.guest.pressure_events import KswapdWakeups


def test_nothing_is_heard_while_nobody_is_in_need() -> None:
    try:
        wakeups = KswapdWakeups()
    except NotPermitted as error:
        pytest.skip(f"NOT TESTED HERE: {error}")
    poller = select.poll()
    for fd in wakeups.fds:
        poller.register(fd, select.POLLIN)
    wakeups.consume()
    assert not poller.poll(0)
    wakeups.close()


def test_without_tracefs_it_says_what_to_mount(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="mount -t tracefs"):
        KswapdWakeups(tmp_path)
