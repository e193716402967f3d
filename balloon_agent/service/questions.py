"""Questions that only the owner thread can answer, since nobody else may look into the ledger."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from balloon_agent.memory.ledger import Ledger

# Between two answers, so many times what the first one took.
ANSWER_SHARE = 10
# By source: the numbers of pieces of memory with any of it in the balloon, and how many bytes.
Located = dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class Question:
    """Where the balloon's memory is, in pieces of so many bytes."""

    cell_bytes: int
    answer: Future[Located]


class Questions:
    """Those not answered yet.

    Whoever asks may not be allowed to change anything: so most of the time goes to the balloon, however many ask.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: list[Question] = []
        self._next_at = 0.0

    def add(self, question: Question) -> None:
        self._open.append(question)

    def answer(self, ledger: Ledger) -> float | None:
        """One, and those that are the same, if it is time for one. Returns in how many seconds to answer the next."""
        self._open = [question for question in self._open if not question.answer.cancelled()]
        if not self._open:
            return None
        begin = self._clock()
        if begin < self._next_at:
            return self._next_at - begin
        size = self._open[0].cell_bytes
        located = ledger.located(size)
        for question in self._open:
            if question.cell_bytes == size and question.answer.set_running_or_notify_cancel():
                question.answer.set_result(located)
        self._open = [question for question in self._open if question.cell_bytes != size]
        now = self._clock()
        self._next_at = now + ANSWER_SHARE * (now - begin)
        return self._next_at - now if self._open else None
