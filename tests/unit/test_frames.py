"""Runs of frames: the same frames come out as went in, whatever is done to them."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.frames import (
    FOUR_GIB_FRAMES,
    FRAME,
    Run,
    from_frames,
    from_pages,
    join,
    split,
    total,
)

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


far_runs = st.builds(
    Run,
    st.builds(lambda gib4, offset: gib4 * FOUR_GIB_FRAMES + offset, st.integers(1, 64), st.integers(-3, 3)),
    st.one_of(st.integers(1, 8), st.integers(FOUR_GIB_FRAMES - 3, 3 * FOUR_GIB_FRAMES)),
)


@given(
    st.lists(far_runs, max_size=5),
    st.sampled_from((FOUR_GIB_FRAMES // 2, FOUR_GIB_FRAMES, 2 * FOUR_GIB_FRAMES, 3 << 20, 1 << 40)),
    st.lists(st.integers(0, 80 * FOUR_GIB_FRAMES), max_size=20).map(sorted),
)
def test_no_piece_has_4_gib_or_reaches_over_them_or_over_a_cut(some: list[Run], boundary: int, cuts: list[int]) -> None:
    pieces = list(split(some, boundary, cuts))
    for piece in pieces:
        assert piece.count < FOUR_GIB_FRAMES
        assert piece.first // FOUR_GIB_FRAMES == (piece.end - 1) // FOUR_GIB_FRAMES
        assert piece.first // boundary == (piece.end - 1) // boundary
        assert not any(piece.first < cut < piece.end for cut in cuts)
    # The same frames in the same order: put together again, each run is what it was.
    at = iter(pieces)
    for run in some:
        first = run.first
        while first < run.end:
            piece = next(at)
            assert piece.first == first
            first = piece.end
        assert first == run.end
    assert next(at, None) is None


@given(st.lists(runs, max_size=20), st.integers(16, 1 << 16), st.lists(st.integers(0, 1 << 24), max_size=20).map(sorted))
def test_nothing_is_cut_where_nothing_needs_it(some: list[Run], boundary: int, cuts: list[int]) -> None:
    places = {first for run in some for first in (run.first, run.end)}
    for piece in split(some, boundary, cuts):
        assert piece.end in places or piece.end % boundary == 0 or piece.end in cuts or piece.end % FOUR_GIB_FRAMES == 0


def test_a_whole_4_gib_are_cut_in_the_middle_so_that_huge_pages_stay_whole() -> None:
    half = FOUR_GIB_FRAMES // 2
    assert list(split([Run(FOUR_GIB_FRAMES, FOUR_GIB_FRAMES)], 1 << 40)) == [
        Run(FOUR_GIB_FRAMES, half),
        Run(FOUR_GIB_FRAMES + half, half),
    ]


@given(st.lists(st.builds(Run, st.integers(0, 200), st.integers(1, 20)), max_size=10))
def test_runs_are_joined_or_refused(some: list[Run]) -> None:
    frames = frames_of(some)
    if len(set(frames)) < len(frames):
        with pytest.raises(ValueError, match="is in two runs"):
            join(some)
    else:
        assert join(some) == from_frames(frames)
        assert all(isinstance(run, Run) for run in join(some))


@given(frame_sets, st.sampled_from((4096, 16384, 65536)), st.randoms())
def test_pages_of_the_guest_are_so_many_frames_each(pages: frozenset[int], page_size: int, chance: Random) -> None:
    scale = page_size // FRAME
    order = list(pages)
    chance.shuffle(order)
    made = from_pages(iter(order), page_size)
    assert frames_of(made) == [page * scale + frame for page in sorted(pages) for frame in range(scale)]
    assert all(left.end < right.first for left, right in pairwise(made))


def test_a_page_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="0x7 is there twice"):
        from_pages([7, 3, 7], 16384)
    with pytest.raises(ValueError, match="no page: -1"):
        from_frames([4, -1])


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4097, 6144, -4096])
def test_a_page_that_is_no_whole_number_of_frames_is_refused(page_size: int) -> None:
    with pytest.raises(ValueError, match=f"pages of {page_size} bytes are no multiple of 4096"):
        from_pages([1], page_size)


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
