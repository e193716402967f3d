"""The choice of the next memory block: a property over whatever happens to blocks, in a tree like sysfs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from balloon_agent.frames import Run
from balloon_agent.linux import memory_blocks
from balloon_agent.memory.sources.block_choice import FAILED_BLOCK_REST, LONGEST_REST, POOLED, SURVEY_HOLDS, BlockChoice
from balloon_agent.memory.sources.block_costs import Survey

BLOCKS = range(6)
BLOCK = 128 << 20
NUMBERS = st.sampled_from(BLOCKS)


class FakeSurvey(Survey):
    """Costs as a test sets them, and pools in the blocks that it names."""

    def __init__(self) -> None:
        self.by_number = dict.fromkeys(BLOCKS, 1)
        self.pooled: set[int] = set()

    def costs(self, runs: Sequence[Run]) -> list[int]:
        return [self.by_number[run.first // (BLOCK // 4096)] for run in runs]

    def smallest_pooled(self) -> int | None:
        return 2 << 20 if self.pooled else None

    def has_pooled(self, run: Run, smallest: int) -> bool:
        return run.first // (BLOCK // 4096) in self.pooled


class Choosing(RuleBasedStateMachine):
    """Blocks fail, go, come back, cost more or less; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        (self.root / "block_size_bytes").write_text(f"{BLOCK:x}\n")
        for number in BLOCKS:
            (self.root / f"memory{number}").mkdir()
            (self.root / f"memory{number}/valid_zones").write_text("Movable\n" if number == 0 else "Normal\n")
            self.set_state(number, "online")
        self.now = 0.0
        self.survey = FakeSurvey()
        self.ours: set[int] = set()
        self.choice = BlockChoice(str(self.root), lambda: self.ours, self.survey, lambda: self.now)
        # Until when each block is to be left alone, at least.
        self.left_alone: dict[int, float] = {}
        self.times: dict[int, int] = {}
        # Came back since they failed: they are empty, and tried again at once.
        self.back: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def set_state(self, number: int, state: str) -> None:
        (self.root / f"memory{number}/state").write_text(f"{state}\n")

    def block(self, number: int) -> memory_blocks.Block:
        return memory_blocks.Block(number, memory_blocks.block_run(number, BLOCK), "Movable" if number == 0 else "Normal")

    def is_online(self, number: int) -> bool:
        return memory_blocks.state(str(self.root), number) == "online"

    @rule(number=NUMBERS, cost=st.integers(0, 3))
    def fill(self, number: int, cost: int) -> None:
        self.survey.by_number[number] = cost

    @rule(numbers=st.sets(NUMBERS, max_size=2))
    def pin(self, numbers: set[int]) -> None:
        self.ours = numbers

    @rule(numbers=st.sets(NUMBERS, max_size=1))
    def grow_pool(self, numbers: set[int]) -> None:
        self.survey.pooled = numbers

    @rule(seconds=st.sampled_from([1.0, SURVEY_HOLDS + 1, FAILED_BLOCK_REST + 1, LONGEST_REST + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(number=NUMBERS)
    def others_take(self, number: int) -> None:
        self.set_state(number, "offline")

    @rule(number=NUMBERS)
    def give_back(self, number: int) -> None:
        self.set_state(number, "online")
        self.survey.by_number[number] = 0
        self.choice.came_back([self.block(number)])
        self.back.add(number)

    @rule()
    def move_pages(self) -> None:
        self.choice.doubt()

    @rule(fails=st.booleans())
    def try_one(self, fails: bool) -> None:
        for _, block in self.choice.next(1):
            if fails:
                self.choice.failed(block, "it is busy")
                times = self.times.get(block.number, 0)
                self.left_alone[block.number] = self.now + min(FAILED_BLOCK_REST * 2**times, LONGEST_REST)
                self.times[block.number] = times + 1
                self.back.discard(block.number)
                assert f"memory{block.number}" in self.choice.reasons()
            else:
                self.set_state(block.number, "offline")
                self.choice.taken([block])
                self.left_alone.pop(block.number, None)
                self.times.pop(block.number, None)

    @precondition(lambda self: self.survey.pooled)
    @rule()
    def pools_are_left_alone(self) -> None:
        assert not {block.number for _, block in self.choice.next(len(BLOCKS))} & self.survey.pooled

    @invariant()
    def only_what_can_be_taken_is_chosen(self) -> None:
        chosen = self.choice.next(len(BLOCKS))
        assert [candidate.ease for candidate in chosen] == sorted(candidate.ease for candidate in chosen)
        for _, block in chosen:
            assert self.is_online(block.number)
            assert block.number not in self.ours
            assert block.number in self.back or self.now >= self.left_alone.get(block.number, 0.0)
        assert all(candidate.cost >= 2 for candidate in self.choice.next(len(BLOCKS), 2))


TestChoosing = Choosing.TestCase


def test_a_block_that_fails_again_and_again_is_left_alone_ever_longer() -> None:
    machine = Choosing()
    for times in range(12):
        for number in BLOCKS:
            machine.others_take(number)
        machine.set_state(3, "online")
        machine.wait(LONGEST_REST + 1)
        machine.try_one(fails=True)
        rest = min(FAILED_BLOCK_REST * 2**times, LONGEST_REST)
        machine.now += rest - 1
        assert machine.choice.next(1) == []
        machine.now += 2
        assert [block.number for _, block in machine.choice.next(1)] == [3]
    machine.teardown()


def test_one_reason_is_given_once() -> None:
    machine = Choosing()
    machine.choice.failed(machine.block(1), "it is busy")
    machine.choice.failed(machine.block(2), "it is busy")
    machine.choice.failed(machine.block(3), "it has holes")
    assert machine.choice.reasons() == "memory1, memory2: it is busy; memory3: it has holes"
    machine.teardown()


def test_a_block_with_huge_pages_of_a_pool_is_left_alone_with_that_reason() -> None:
    machine = Choosing()
    machine.grow_pool({2})
    assert {block.number for _, block in machine.choice.next(len(BLOCKS))} == {*BLOCKS} - {2}
    assert machine.choice.reasons() == f"memory2: {POOLED}"
    machine.teardown()
