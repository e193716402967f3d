"""Questions that only the owner thread can answer, since nobody else may look into the ledger."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from balloon_agent.api.messages import MapWriter
from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.size import format_size

# Between two answers, so many times what the first one took.
ANSWER_SHARE = 10
# Seconds of an answer that are worked on at a time: a step of the balloon waits no longer than that.
SLICE = 0.005
# As many as balloonctl asks for. An encoded answer has 1.2 MB then.
MOST_CELLS = 1 << 16


@dataclass(frozen=True)
class Question:
    """Where the balloon's memory is, in cells of so many bytes. The answer is encoded: one for all who ask the same."""

    cell_bytes: int
    answer: Future[bytes]


class Cartographer:
    """Makes an answer chunk by chunk. Each chunk is as it was when its turn came: the balloon may move between two of them."""

    def __init__(self, ledger: Ledger, cell_bytes: int) -> None:
        self.cell_bytes = cell_bytes
        self._ledger = ledger
        self._left = ledger.chunks()[::-1]
        self._writer = MapWriter()
        # By source: the cell that was come to, and how many bytes are held in it so far.
        self._begun: dict[str, tuple[int, int]] = {}

    def go_on(self) -> bool:
        """One chunk more, of 64 MiB. Whether there are others. BadInput if that makes too large an answer."""
        if self._left:
            for source, cell, frames in self._ledger.cells(self._left.pop(), self.cell_bytes // FRAME):
                self._count(source, cell, frames * FRAME)
            if self._writer.cells > MOST_CELLS:
                raise BadInput(
                    f"more than {MOST_CELLS} pieces of {format_size(self.cell_bytes)} have memory of the balloon in them: "
                    "ask for larger ones"
                )
        return bool(self._left)

    def _count(self, source: str, cell: int, size: int) -> None:
        begun, before = self._begun.get(source, (cell, 0))
        if begun != cell:
            self._writer.add(source, begun, before)
            before = 0
        self._begun[source] = cell, before + size

    def line(self) -> bytes:
        """The encoded answer, once there are no others."""
        for source, (cell, size) in self._begun.items():
            self._writer.add(source, cell, size)
        self._begun.clear()
        return self._writer.line()


class Questions:
    """Those not answered yet.

    Whoever asks may not be allowed to change anything: so most of the time goes to the balloon, however many ask.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: list[Question] = []
        self._making: Cartographer | None = None
        self._spent = self._next_at = 0.0

    def add(self, question: Question) -> None:
        self._open.append(question)

    def answer(self, ledger: Ledger) -> float | None:
        """Work on one, and those that are the same, if it is time for one. Returns in how many seconds to go on, if at all."""
        self._open = [question for question in self._open if not question.answer.cancelled()]
        if self._making is not None and all(question.cell_bytes != self._making.cell_bytes for question in self._open):
            # Nobody waits for it any more.
            self._rest()
        if not self._open:
            return None
        begin = self._clock()
        if begin < self._next_at:
            return self._next_at - begin
        if self._making is None:
            self._making = Cartographer(ledger, self._open[0].cell_bytes)
        self._go_on(self._making, begin)
        self._spent += self._clock() - begin
        if self._making is not None:
            return 0.0
        self._rest()
        return max(0.0, self._next_at - self._clock()) if self._open else None

    def _go_on(self, making: Cartographer, begin: float) -> None:
        try:
            while making.go_on():
                if self._clock() - begin >= SLICE:
                    return
            self._settle(making, making.line())
        except BadInput as error:
            self._settle(making, error)

    def _settle(self, making: Cartographer, outcome: bytes | BadInput) -> None:
        for question in self._open:
            if question.cell_bytes == making.cell_bytes and question.answer.set_running_or_notify_cancel():
                if isinstance(outcome, BadInput):
                    question.answer.set_exception(outcome)
                else:
                    question.answer.set_result(outcome)
        self._open = [question for question in self._open if question.cell_bytes != making.cell_bytes]
        self._making = None

    def _rest(self) -> None:
        self._making = None
        self._next_at = self._clock() + ANSWER_SHARE * self._spent
        self._spent = 0.0
