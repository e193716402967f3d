"""Events: handlers in the order in which they were registered, for the descriptors that are ready."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest

from balloon_agent.agent.events import Events


class Descriptors:
    """Event counters, all of them silent at first."""

    def __init__(self, stack: ExitStack) -> None:
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(4)]
        for fd in self.fds:
            stack.callback(os.close, fd)

    def tell(self, *which: int) -> None:
        for number in which:
            os.eventfd_write(self.fds[number], 1)


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    with ExitStack() as stack:
        yield Descriptors(stack)


def test_handlers_are_called_in_their_order(descriptors: Descriptors) -> None:
    heard: list[int] = []
    events = Events()
    for number in (2, 0, 3, 1):
        events.expect_input(descriptors.fds[number], lambda number=number: heard.append(number))  # type: ignore[misc]
    descriptors.tell(0, 1, 2)
    events.wait(None)
    assert heard == [2, 0, 1]


def test_a_source_with_several_descriptors_hears_of_those_that_are_ready(descriptors: Descriptors) -> None:
    heard: list[Mapping[int, int]] = []
    events = Events()
    first, second, third, _ = descriptors.fds
    events.expect({first: select.POLLIN, second: select.POLLIN, third: select.POLLIN | select.POLLOUT}, heard.append)
    descriptors.tell(1)
    events.wait(None)
    assert heard == [{second: select.POLLIN, third: select.POLLOUT}]


def test_without_any_event_a_sleep_ends_with_its_pause(descriptors: Descriptors) -> None:
    heard: list[int] = []
    events = Events()
    events.expect_input(descriptors.fds[0], lambda: heard.append(0))
    events.expect({}, lambda _: heard.append(1))
    events.wait(0.0)
    assert heard == []


def test_a_handler_that_raises_ends_the_turn(descriptors: Descriptors) -> None:
    """Descriptors that are ready yet are so at the next sleep."""

    def fails() -> None:
        raise OSError("no more")

    heard: list[int] = []
    events = Events()
    events.expect_input(descriptors.fds[0], fails)
    events.expect_input(descriptors.fds[1], lambda: heard.append(1))
    descriptors.tell(0, 1)
    with pytest.raises(OSError, match="no more"):
        events.wait(None)
    assert heard == []
