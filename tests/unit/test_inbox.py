"""The inbox: what other threads leave for the owner, and its wake-up."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest

from balloon_agent.agent.inbox import Command, Inbox
from balloon_agent.agent.questions import Question
from balloon_agent.errors import BadInput, BalloonError
from balloon_agent.sizing.governor import Mode

RAM = 1 << 30


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    inbox = Inbox(RAM, lambda: "inflating")
    yield inbox
    inbox.close()


def is_readable(inbox: Inbox) -> bool:
    return bool(select.select([inbox], [], [], 0)[0])


def test_commands_come_in_order_with_their_numbers_and_wake_the_owner(inbox: Inbox) -> None:
    assert not is_readable(inbox)
    assert [inbox.command(Mode.MANUAL, 8192), inbox.command(Mode.HOLD, None), inbox.command(Mode.MANUAL, RAM)] == [1, 2, 3]
    assert is_readable(inbox)
    assert [*inbox.take()] == [Command(1, Mode.MANUAL, 8192), Command(2, Mode.HOLD, None), Command(3, Mode.MANUAL, RAM)]
    assert not is_readable(inbox)
    assert [*inbox.take()] == []


@pytest.mark.parametrize("size", [-4096, 4097, RAM + 4096])
def test_a_size_that_is_none_is_refused_and_nothing_is_left(inbox: Inbox, size: int) -> None:
    with pytest.raises(BadInput, match=f"^{size} bytes is no size for this balloon: a multiple of 4096 up to .*1024 MiB"):
        inbox.command(Mode.MANUAL, size)
    assert not is_readable(inbox)
    assert [*inbox.take()] == []


def test_a_wake_up_is_never_waited_for(inbox: Inbox) -> None:
    # A pipe has room for 65536 of them.
    for _ in range(70000):
        inbox.wake()
    assert is_readable(inbox)


def test_a_question_is_answered_by_the_owner(inbox: Inbox) -> None:
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(inbox.locate(1 << 21)))
    asking.start()
    assert select.select([inbox], [], [], 60)[0]
    (question,) = inbox.take()
    assert isinstance(question, Question)
    assert question.cell_bytes == 1 << 21
    question.answer.set_result(b"here\n")
    asking.join(60)
    assert answers == [b"here\n"]


def test_a_question_that_is_not_answered_is_taken_back(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balloon_agent.agent.inbox.ANSWER_DEADLINE", 0.01)
    with pytest.raises(BalloonError, match=r"^the agent is busy with inflating; try again later$"):
        inbox.locate(1 << 21)
    (question,) = inbox.take()
    assert isinstance(question, Question)
    assert question.answer.cancelled()
