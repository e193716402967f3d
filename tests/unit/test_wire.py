"""Layouts and numbers that travel: as the specification and the proposal have them."""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.balloon.channels import FRAMES_PER_BUFFER, FRAMES_PER_HUGE_BUFFER
from balloon_agent.balloon.queues import queue_numbers
from balloon_agent.balloon.wire import (
    BalloonConfiguration,
    BalloonFeature,
    ContEntry,
    Statistic,
    StatisticTag,
    frame_arrays,
    in_batches,
    pack_runs,
    pack_statistics,
)
from balloon_agent.errors import ConfigurationInvalid
from balloon_agent.frames import FRAMES_PER_HUGE, Run
from balloon_agent.virtio.spec import CommonConfiguration, Descriptor, VendorCapability
from tests.device_model.numbering import CONT, HINT, REPORTING, ROLES, SCHEMES, STATS, qemu


def offsets(structure: type[ctypes.Structure]) -> dict[str, int]:
    return {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}


def test_layouts() -> None:
    assert offsets(BalloonConfiguration) == {"num_pages": 0, "actual": 4, "free_page_hint_cmd_id": 8, "poison_val": 12}
    assert offsets(ContEntry) == {"pfn": 0, "size": 4}
    assert ctypes.sizeof(ContEntry) == 8
    # Spec 5.5.6.3: packed, where a compiler would put the value at 8.
    assert offsets(Statistic) == {"tag": 0, "val": 2}
    assert ctypes.sizeof(Statistic) == 10
    assert offsets(Descriptor) == {"addr": 0, "len": 8, "flags": 12, "next": 14}
    assert ctypes.sizeof(VendorCapability) == 16
    # virtio 1.3, 4.1.4.3.
    assert list(offsets(CommonConfiguration).values()) == [0, 4, 8, 12, 16, 18, 20, 21, 22, 24, 26, 28, 30, 32, 40, 48]


@given(st.lists(st.builds(Run, st.integers(0, 1 << 31), st.integers(1, 0xFFFFF)), max_size=50))
def test_runs_are_packed_as_pairs_of_frame_and_bytes(runs: list[Run]) -> None:
    data = pack_runs(runs)
    assert list(struct.iter_unpack("<II", data)) == [(run.first, run.count * 4096) for run in runs]


@pytest.mark.parametrize("run", [Run(0, 1 << 20), Run(1 << 32, 1), Run((1 << 32) - 1, 2)])
def test_a_run_that_32_bits_cannot_carry_is_refused_whole(run: Run) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        pack_runs([Run(0, 1), run])


@given(st.lists(st.integers(), max_size=40), st.integers(1, 7))
def test_batches_keep_the_order_and_their_bound(items: list[int], size: int) -> None:
    batches = list(in_batches(items, size))
    assert [item for batch in batches for item in batch] == items
    assert all(1 <= len(batch) <= size for batch in batches)


def arrays(runs: list[Run], most: int) -> list[list[int]]:
    return [[frame for (frame,) in struct.iter_unpack("<I", data)] for data in frame_arrays(runs, most)]


@given(st.lists(st.builds(Run, st.integers(0, 1 << 20), st.integers(1, 2000)), max_size=8), st.sampled_from([256, 512]))
def test_frame_arrays_keep_the_order_and_their_bound(runs: list[Run], most: int) -> None:
    found = arrays(runs, most)
    assert [frame for array in found for frame in array] == [frame for run in runs for frame in range(run.first, run.end)]
    assert all(1 <= len(array) <= most for array in found)


@given(st.integers(0, 5000), st.integers(0, 1 << 10), st.integers(0, 4000))
def test_a_huge_page_fits_one_buffer_where_the_host_wants_that(first: int, before: int, after: int) -> None:
    """Whatever single frames come before and after it: QEMU puts a huge page together from one buffer only."""
    huge = Run(FRAMES_PER_HUGE * 100, 3 * FRAMES_PER_HUGE)
    runs = [*([Run(first, before)] if before else []), huge, Run(FRAMES_PER_HUGE * 200 + 1, after + 1)]
    found = arrays(runs, FRAMES_PER_HUGE_BUFFER)
    for page in range(100, 103):
        frames = set(range(page * FRAMES_PER_HUGE, (page + 1) * FRAMES_PER_HUGE))
        assert [array for array in found if frames & set(array)] == [array for array in found if frames <= set(array)]
    # Two buffers one behind the other otherwise.
    halves = arrays([huge], FRAMES_PER_BUFFER)
    assert halves == [list(range(at, at + 256)) for at in range(huge.first, huge.end, 256)]


def test_a_frame_that_32_bits_cannot_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bits"):
        list(frame_arrays([Run((1 << 32) - 1, 2)], 256))


def test_statistics_are_packed_in_ten_bytes_each() -> None:
    data = pack_statistics({StatisticTag.FREE_MEMORY: 1 << 40, StatisticTag.OOM_KILLS: -1})
    assert data == struct.pack("<HQHQ", 4, 1 << 40, 10, (1 << 64) - 1)
    assert [int(tag) for tag in StatisticTag] == list(range(16))


# -- which queue is which ---------------------------------------------------------------------------------------------


def expected(roles: list[str | None], offered: int) -> dict[str, int | None]:
    """Each offered queue at its place."""
    wanted = {role for role in ROLES if role in ("inflate", "deflate") or offered & FEATURES[role]}
    return {role: roles.index(role) if role in wanted else None for role in ROLES}


FEATURES = {"stats": STATS, "free_page": HINT, "reporting": REPORTING, "inflate_cont": CONT, "deflate_cont": CONT}
EVERY_COMBINATION = [
    stats | hint | reporting | cont
    for stats in (0, STATS)
    for hint in (0, HINT)
    for reporting in (0, REPORTING)
    for cont in (0, CONT)
]


def sizes_of(roles: list[str | None]) -> list[int]:
    return [{"free_page": 1024, "reporting": 32}.get(role, 128) if role else 0 for role in roles]


@pytest.mark.parametrize("offered", EVERY_COMBINATION)
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_combination_of_features_in_every_numbering(scheme: str, offered: int) -> None:
    roles = SCHEMES[scheme](offered)
    found = queue_numbers(offered | BalloonFeature.MUST_TELL_HOST, sizes_of(roles))
    assert vars(found) == expected(roles, offered)


@pytest.mark.parametrize("offered", [offered for offered in EVERY_COMBINATION if not offered & HINT])
def test_a_hinting_queue_that_was_made_and_then_withdrawn(offered: int) -> None:
    roles = qemu(offered, hint_withdrawn=True)
    assert vars(queue_numbers(offered, sizes_of(roles))) == expected(roles, offered)


@pytest.mark.parametrize(
    ("offered", "sizes", "cont"),
    [
        # QEMU with the proposal's own patch: without and with free-page-hint.
        (STATS | CONT, [128] * 5, (3, 4)),
        (STATS | HINT | CONT, [128, 128, 128, 1024, 128, 128], (4, 5)),
        # Ours with all there is.
        (STATS | HINT | REPORTING | CONT, [128, 128, 128, 1024, 32, 128, 128], (5, 6)),
        # The proposal's enum, with holes.
        (STATS | CONT, [128, 128, 128, 0, 0, 128, 128], (5, 6)),
    ],
)
def test_where_the_cont_queues_are(offered: int, sizes: list[int], cont: tuple[int, int]) -> None:
    found = queue_numbers(offered, sizes)
    assert (found.inflate_cont, found.deflate_cont) == cont


@pytest.mark.parametrize(
    ("offered", "sizes"),
    [
        (0, []),
        (0, [128]),
        (0, [0, 128]),
        (CONT, [128] * 3),
        (CONT | STATS, [128, 128, 128, 0, 128]),
        (CONT | STATS, [128] * 5 + [0, 128]),
        (CONT | STATS, [128] * 7),
        (CONT | STATS, [128] * 9 + [0]),
        (STATS, [128, 128, 0]),
        (STATS | REPORTING, [128] * 3),
        (REPORTING, [128, 128, 128, 0, 0]),
        (0, [128, 128, 128, 0, 32]),
    ],
)
def test_queues_that_make_no_sense_are_refused_with_what_was_seen(offered: int, sizes: list[int]) -> None:
    with pytest.raises(ConfigurationInvalid) as caught:
        queue_numbers(offered, sizes)
    assert str(sizes) in str(caught.value)
    assert f"{offered:#x}" in str(caught.value)


@given(st.integers(0, 127), st.lists(st.sampled_from([0, 32, 128, 1024]), max_size=9))
def test_no_queue_is_taken_for_two_or_found_where_there_is_none(offered: int, sizes: list[int]) -> None:
    try:
        found = vars(queue_numbers(offered, sizes))
    except ConfigurationInvalid:
        return
    numbers = [number for number in found.values() if number is not None]
    assert len(set(numbers)) == len(numbers)
    assert all(sizes[number] for number in numbers)
    assert {role for role, number in found.items() if number is not None} == {
        role for role in ROLES if role in ("inflate", "deflate") or offered & FEATURES[role]
    }
