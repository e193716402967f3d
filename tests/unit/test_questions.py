"""Where the balloon's memory is: answered in parts, between the steps of the balloon, and once for all who ask the same."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.agent import questions as questions_module
from balloon_agent.agent.questions import (
    ANSWER_SHARE,
    SLICE,
    Cartographer,
    Question,
    Questions,
)
from balloon_agent.api.messages import Answer, encode
from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME, Run, from_frames
from balloon_agent.memory.ledger.frame_index import CHUNK
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from tests.device_model.guest import MIB

Located = dict[str, list[list[int]]]


def located(ledger: Ledger, cell_bytes: int) -> Located:
    """By source: cells and how many bytes of each, as a client reads them."""
    making = Cartographer(ledger, cell_bytes)
    while making.go_on():
        pass
    found: Located = json.loads(making.line())["map"]
    return found


def ledger_of(frames: Iterable[int], source: str = "pages") -> Ledger:
    ledger = Ledger()
    ledger.add(Extent("1", source, from_frames(frames), "h"))
    return ledger


class Clock:
    """Goes on by so many seconds each time it is read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@given(
    st.sets(st.integers(0, 4 * CHUNK).map(lambda number: number // 7 * 3), max_size=200),
    st.sets(st.integers(0, 4 * CHUNK).map(lambda number: number // 7 * 3 + 1), max_size=200),
    st.sampled_from([1, 2, 3, 32, 33, 64]),
)
def test_every_frame_is_counted_in_its_cell(pages: set[int], huge: set[int], size: int) -> None:
    ledger = Ledger()
    expected: dict[str, Counter[int]] = {}
    for source, frames in (("pages", pages), ("thp", huge)):
        if frames:
            ledger.add(Extent(source, source, from_frames(frames), "h"))
            expected[source] = Counter()
            for frame in frames:
                expected[source][frame * FRAME // (size * 2 * MIB)] += FRAME
    found = located(ledger, size * 2 * MIB)
    assert found == {source: [list(cell) for cell in sorted(cells.items())] for source, cells in expected.items()}


def test_a_run_longer_than_a_cell_is_in_all_that_it_crosses() -> None:
    ledger = Ledger()
    ledger.add(Extent("1", "blocks", [Run(CHUNK - 100, CHUNK + 200)]))
    assert located(ledger, 32 * MIB) == {
        "blocks": [[1, 100 * FRAME], [2, 32 * MIB], [3, 32 * MIB], [4, 100 * FRAME]],
    }


def test_the_line_is_what_the_schema_says() -> None:
    line = Cartographer(Ledger(), 2 * MIB).line()
    assert line == encode(Answer(ok=True, map={}))
    making = Cartographer(ledger_of([1, 2, 5000]), 2 * MIB)
    assert not making.go_on()
    line = making.line()
    answer = msgspec.json.decode(line, type=Answer)
    assert answer.map == {"pages": [(0, 2 * FRAME), (9, FRAME)]}
    assert encode(answer) == line


def test_an_answer_that_would_be_too_long_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "MOST_CELLS", 60)
    ledger = ledger_of(range(0, 4 * CHUNK, 512))
    with pytest.raises(BadInput, match=r"more than 60 pieces of 2 MiB have .*: ask for larger ones"):
        located(ledger, 2 * MIB)
    assert len(located(ledger, 8 * MIB)["pages"]) == 32


def asked(questions: Questions, *sizes: int) -> list[Question]:
    made = [Question(size * MIB, Future()) for size in sizes]
    for question in made:
        questions.add(question)
    return made


def test_the_owner_works_on_an_answer_for_a_slice_at_a_time() -> None:
    ledger = ledger_of(range(0, 40 * CHUNK, CHUNK))
    clock = Clock(SLICE / 4)
    questions = Questions(clock)
    (question,) = asked(questions, 64)
    turns, longest = 0, 0.0
    while not question.answer.done():
        begin = clock.now
        assert questions.answer(ledger) == (0.0 if not question.answer.done() else None)
        turns, longest = turns + 1, max(longest, clock.now - begin)
    assert turns >= 10
    assert longest <= 2 * SLICE + clock.tick
    assert len(json.loads(question.answer.result())["map"]["pages"]) == 40


def test_the_balloon_may_move_between_two_slices() -> None:
    ledger = ledger_of(range(4), "thp")
    ledger.add(Extent("2", "pages", from_frames(range(CHUNK, 3 * CHUNK, 2)), "h"))
    making = Cartographer(ledger, 64 * MIB)
    assert making.go_on()
    assert making.go_on()
    ledger.remove("2")
    ledger.add(Extent("3", "pages", from_frames(range(2 * CHUNK, 2 * CHUNK + 4)), "h"))
    assert not making.go_on()
    assert json.loads(making.line())["map"] == {"thp": [[0, 4 * FRAME]], "pages": [[1, 32 * MIB], [2, 4 * FRAME]]}


def test_however_many_ask_most_of_the_time_is_the_balloons() -> None:
    ledger = ledger_of([1])
    clock = Clock(0.5)
    questions = Questions(clock)
    made = asked(questions, 2, 4, 2, 8, 2)
    made[3].answer.cancel()
    pause = questions.answer(ledger)
    assert [question.answer.done() for question in made] == [True, False, True, True, True]
    # One and the same bytes for all who asked the same.
    assert made[0].answer.result() is made[2].answer.result() is made[4].answer.result()
    clock.tick = 0.0
    assert pause is not None
    assert ANSWER_SHARE * 0.5 - 1 < pause <= ANSWER_SHARE * 1.5
    assert questions.answer(ledger) is not None
    assert not made[1].answer.done()
    clock.now += pause
    assert questions.answer(ledger) is None
    assert made[1].answer.done()


def test_an_answer_that_nobody_waits_for_any_more_is_not_made_to_its_end() -> None:
    ledger = ledger_of(range(0, 40 * CHUNK, CHUNK))
    clock = Clock(SLICE)
    questions = Questions(clock)
    (question,) = asked(questions, 64)
    assert questions.answer(ledger) == 0.0
    question.answer.cancel()
    assert questions.answer(ledger) is None
    # What it took counts all the same.
    (other,) = asked(questions, 64)
    pause = questions.answer(ledger)
    assert pause is not None
    assert pause > SLICE
    assert not other.answer.done()


def test_who_asks_too_finely_is_told_and_the_next_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions_module, "MOST_CELLS", 3)
    ledger = ledger_of(range(0, CHUNK, 512))
    questions = Questions(Clock())
    fine, coarse = asked(questions, 2, 64)
    while questions.answer(ledger) is not None:
        pass
    with pytest.raises(BadInput, match="ask for larger ones"):
        fine.answer.result()
    assert json.loads(coarse.answer.result())["map"] == {"pages": [[0, 32 * FRAME]]}
