"""Sizes as people write them, and how big the balloon should be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.errors import BadInput
from balloon_agent.size import format_size, parse_size, parse_wish
from balloon_agent.sizing.governor import Mode, Wishes, decide, reserve_for

MIB = 1 << 20


def wishes(host_target: int = 0, manual: int | None = None, ram: int = 1 << 44, **others: Any) -> Wishes:
    mode: dict[str, Any] = {} if manual is None else {"mode": Mode.MANUAL, "size": manual}
    defaults: dict[str, Any] = {"most": 1 << 44, "now": 0}
    return Wishes(host_target=host_target, ram=ram, **(defaults | mode | others))


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


def test_sizes_are_relative_too() -> None:
    assert parse_wish("+64M", 100 * MIB, 1 << 30) == 164 * MIB
    assert parse_wish(" -64M", 100 * MIB, 1 << 30) == 36 * MIB
    assert parse_wish("25%", 0, 1 << 30) == 256 * MIB
    assert parse_wish("33.3 %", 0, 1 << 30) % 4096 == 0
    assert parse_wish("7M", 100 * MIB, 1 << 30) == 7 * MIB


@pytest.mark.parametrize("text", ["-101M", "+", "-", "101%", "%", "-5%", "1e1%", "+-4M"])
def test_what_is_no_relative_size_is_refused_with_what_was_said(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_wish(text, 100 * MIB, 1 << 30)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 1 << 32))
def test_what_is_printed_can_be_read_again(frames: int) -> None:
    size = frames * 4096
    if len(f"{size / MIB:.10f}".replace(".", "").lstrip("0").rstrip("0")) <= 10:
        assert parse_size(format_size(size)) == size


@given(st.integers(0, 1 << 44), st.one_of(st.none(), st.integers(0, 1 << 44)), st.integers(0, 1 << 44))
def test_the_decision_fits_the_guest(host: int, manual: int | None, ram: int) -> None:
    decision = decide(wishes(host_target=host, manual=manual, ram=ram))
    wanted = host if manual is None else manual
    assert decision.size % 4096 == 0
    assert decision.size <= min(wanted, ram)
    assert decision.size > min(wanted, ram) - 4096
    assert ("by hand" in decision.reason) == (manual is not None)
    assert ("more than the guest's" in decision.reason) == (wanted > ram)


@given(st.integers(1, 1 << 44), st.integers(0, 1 << 44), st.integers(0, 1 << 30))
def test_a_host_that_asks_for_more_than_the_machine_has_is_not_followed(beyond: int, most: int, frames: int) -> None:
    now = frames * 4096
    decision = decide(wishes(host_target=most + beyond, ram=max(most, now), most=most, now=now))
    assert decision.size == now
    assert f"{most + beyond} bytes, and the machine has {most}" in decision.reason
    # By hand it is still set.
    assert decide(wishes(host_target=most + beyond, manual=4096, ram=max(most, 4096), most=most)).size == 4096


sizes = st.integers(0, 1 << 20).map(lambda frames: frames * 4096)


@given(sizes, st.one_of(st.none(), sizes), sizes, st.one_of(st.none(), sizes), st.one_of(st.none(), sizes), st.booleans())
def test_limits_and_need(host: int, manual: int | None, lower: int, upper: int | None, cap: int | None, below: bool) -> None:
    ram = 1 << 32
    free = decide(wishes(host, manual, ram=ram, lower=lower, upper=upper))
    needy = decide(wishes(host, manual, ram=ram, lower=lower, upper=upper, cap=cap, below_target=below))
    asked = host if manual is None else manual
    assert free.size == (min(asked, upper) if upper is not None and asked > upper else max(asked, lower))
    assert needy.wanted == free.size
    assert ("needs memory" in needy.reason) == (cap is not None and cap < free.size)
    assert needy.size <= free.size
    if cap is None:
        assert needy == free
    elif below:
        # Need goes before everything, limits included.
        assert needy.size == min(cap, free.size)
    else:
        assert needy.size >= min(host, free.size)
        assert needy.size == max(min(cap, free.size), min(host, free.size))


def test_a_balloon_that_is_held_stays_as_it_was() -> None:
    decision = decide(Wishes(host_target=7 << 20, ram=1 << 30, most=1 << 30, now=5 << 20, mode=Mode.HOLD, size=6 << 20))
    assert (decision.size, decision.reason) == (6 << 20, "held as it was")


def test_the_reserve_grows_with_the_guest() -> None:
    assert reserve_for(256 * MIB) == 64 * MIB
    assert reserve_for(64 << 30) == (64 << 30) // 20
