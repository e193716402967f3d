"""Sizes as people write them, and how big the balloon should be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.errors import BadInput
from balloon_agent.sizing.governor import decide, reserve_for
from balloon_agent.sizing.size import format_size, parse_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("424M", 424 * MIB),
        ("424MiB", 424 * MIB),
        ("1.5g", 1536 * MIB),
        ("4096", 4096),
        ("8k", 8192),
        (" 1 GiB ", 1 << 30),
        ("0", 0),
    ],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1.0001M", "100", "12 apples", "1e6", "0x1000", "4096.5", "NaN", "1MM"])
def test_what_is_no_size_is_refused_with_what_was_said(text: str) -> None:
    with pytest.raises(BadInput, match=r"4096|no size") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 1 << 32))
def test_what_is_printed_can_be_read_again(frames: int) -> None:
    size = frames * 4096
    if len(f"{size / MIB:.10f}".replace(".", "").lstrip("0").rstrip("0")) <= 10:
        assert parse_size(format_size(size)) == size


@given(st.integers(0, 1 << 44), st.one_of(st.none(), st.integers(0, 1 << 44)), st.integers(0, 1 << 44))
def test_the_decision_fits_the_guest(host: int, manual: int | None, ram: int) -> None:
    decision = decide(host, manual, ram, 1 << 44, 0)
    wanted = host if manual is None else manual
    assert decision.size % 4096 == 0
    assert decision.size <= min(wanted, ram)
    assert decision.size > min(wanted, ram) - 4096
    assert ("by hand" in decision.reason) == (manual is not None)
    assert ("more than the guest's" in decision.reason) == (wanted > ram)


@given(st.integers(1, 1 << 44), st.integers(0, 1 << 44), st.integers(0, 1 << 30))
def test_a_host_that_asks_for_more_than_the_machine_has_is_not_followed(beyond: int, most: int, frames: int) -> None:
    now = frames * 4096
    decision = decide(most + beyond, None, most, most, now)
    assert decision.size == now
    assert f"{most + beyond} bytes, and the machine has {most}" in decision.reason
    # By hand it is still set.
    assert decide(most + beyond, 4096, max(most, 4096), most, now).size == 4096


def test_the_reserve_grows_with_the_guest() -> None:
    assert reserve_for(256 * MIB) == 64 * MIB
    assert reserve_for(64 << 30) == (64 << 30) // 20
