"""Layouts and numbers that travel: as the specification and the proposal have them."""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.balloon.queues import ContQueues, cont_queues
from balloon_agent.balloon.wire import BalloonConfiguration, BalloonFeature, ContEntry, in_buffers, pack_runs
from balloon_agent.errors import DeviceMisbehaved
from balloon_agent.memory.frames import Run
from balloon_agent.virtio.spec import CommonConfiguration, Descriptor, VendorCapability

CONT, HINT, REPORTING, STATS = (
    BalloonFeature.CONT_PAGES,
    BalloonFeature.FREE_PAGE_HINT,
    BalloonFeature.REPORTING,
    BalloonFeature.STATS_VQ,
)


def offsets(structure: type[ctypes.Structure]) -> dict[str, int]:
    return {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}


def test_layouts() -> None:
    assert offsets(BalloonConfiguration) == {"num_pages": 0, "actual": 4, "free_page_hint_cmd_id": 8, "poison_val": 12}
    assert offsets(ContEntry) == {"pfn": 0, "size": 4}
    assert ctypes.sizeof(ContEntry) == 8
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


@given(st.lists(st.builds(Run, st.integers(0, 99), st.integers(1, 9)), max_size=40), st.integers(1, 7))
def test_buffers_keep_the_order_and_their_bound(runs: list[Run], entries: int) -> None:
    batches = list(in_buffers(runs, entries))
    assert [run for batch in batches for run in batch] == runs
    assert all(1 <= len(batch) <= entries for batch in batches)


@pytest.mark.parametrize(
    ("offered", "sizes", "expected"),
    [
        (CONT | STATS, [128] * 5, ContQueues(3, 4)),
        (CONT | STATS | REPORTING, [128, 128, 128, 32, 128, 128], ContQueues(4, 5)),
        (CONT | STATS | HINT, [128, 128, 128, 1024, 128, 128], ContQueues(4, 5)),
        (CONT | STATS | HINT | REPORTING, [128, 128, 128, 1024, 32, 128, 128], ContQueues(5, 6)),
        # Hinting was withdrawn after its queue had been made.
        (CONT | STATS, [128, 128, 128, 1024, 128, 128], ContQueues(4, 5)),
        # Fixed numbers, with holes.
        (CONT | STATS, [128, 128, 128, 0, 0, 128, 128], ContQueues(5, 6)),
        (CONT | STATS | REPORTING, [128, 128, 128, 0, 32, 128, 128], ContQueues(5, 6)),
    ],
)
def test_the_cont_queues_are_found(offered: int, sizes: list[int], expected: ContQueues) -> None:
    assert cont_queues(offered, sizes) == expected


@pytest.mark.parametrize("sizes", [[], [128] * 3, [128] * 4, [128, 128, 128, 0, 128], [128] * 5 + [0, 128], [128] * 9 + [0]])
def test_queues_that_make_no_sense_are_refused_with_what_was_seen(sizes: list[int]) -> None:
    if len(sizes) > 6 and sizes[5] and sizes[6]:
        assert cont_queues(CONT | STATS, sizes) == ContQueues(5, 6)
        return
    with pytest.raises(DeviceMisbehaved) as caught:
        cont_queues(CONT | STATS, sizes)
    assert str(sizes) in str(caught.value)
