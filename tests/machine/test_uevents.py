"""The kernel's uevents on the running kernel."""

from __future__ import annotations

import select
from pathlib import Path

import pytest

from balloon_agent.linux import uevents as module
from balloon_agent.linux.uevents import Uevents


def test_the_kernel_may_tell_of_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket reports POLLERR then, and works on."""
    monkeypatch.setattr(module, "_BUFFER", 4096)
    uevents = Uevents("mem")
    try:
        for _ in range(3000):
            Path("/sys/class/mem/null/uevent").write_text("change")
    except OSError as error:
        pytest.skip(f"NOT TESTED HERE: {error}")
    poller = select.poll()
    poller.register(uevents, select.POLLIN)
    [(_, events)] = poller.poll(0)
    assert events & select.POLLERR
    assert uevents.take() is None
    assert not poller.poll(0)
    assert uevents.take() == []
    uevents.close()
