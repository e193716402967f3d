"""Runs of frames: the same frames come out as went in, whatever is done to them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.memory.frames import FRAME, Run, from_frames, join, split, total

frame_sets = st.frozensets(st.integers(0, 1 << 20), max_size=200)
runs = st.builds(Run, st.integers(0, 1 << 24), st.integers(1, 1 << 10))


def frames_of(some: list[Run]) -> list[int]:
    return [frame for run in some for frame in range(run.first, run.end)]


@given(frame_sets)
def test_single_frames_become_the_fewest_runs_that_hold_them(frames: frozenset[int]) -> None:
    joined = from_frames(frames)
    assert frames_of(joined) == sorted(frames)
    # No two of them touch: else they would be one.
    assert all(left.end < right.first for left, right in pairwise(joined))


@given(st.lists(runs, max_size=20), st.integers(16, 1 << 16))
def test_split_keeps_the_frames_and_crosses_no_boundary(some: list[Run], boundary: int) -> None:
    pieces = list(split(some, boundary))
    assert total(pieces) == total(some)
    assert all(piece.first // boundary == (piece.end - 1) // boundary for piece in pieces)
    at = iter(pieces)
    for run in some:
        first = run.first
        while first < run.end:
            piece = next(at)
            assert piece.first == first
            first = piece.end
        assert first == run.end


def test_a_frame_in_two_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5 is in two runs"):
        join([Run(0, 6), Run(5, 1)])


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (3, -2)])
def test_what_is_no_run_cannot_be_made(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="no run"):
        Run(first, count)


def test_sizes_are_in_bytes() -> None:
    assert Run(7, 3).size == 3 * FRAME
    assert total([Run(0, 1), Run(9, 2)]) == 3 * FRAME
