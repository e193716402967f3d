"""The driver against a device that was written from the specification."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon_agent.balloon.device import ANSWER_DEADLINE, BalloonDevice
from balloon_agent.errors import DeviceMisbehaved, DeviceTimeout, FeatureMissing
from balloon_agent.memory.frames import FRAME, Run, from_frames
from balloon_agent.virtio.device import RESET_DEADLINE
from tests.device_model.model import CONT, FAILED, HINT, MODERN, NEEDS_RESET, REPORTING, STATS, BalloonModel, Breach, Quirks


class Clock:
    """Time that passes by being looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def started(model: BalloonModel) -> BalloonDevice:
    device = BalloonDevice(model, Clock())
    device.start()
    return device


@pytest.mark.parametrize(
    ("features", "queues"),
    [(0, 5), (REPORTING, 6), (HINT, 6), (HINT | REPORTING, 7)],
)
@pytest.mark.parametrize("late", [False, True])
def test_runs_arrive_and_come_back(features: int, queues: int, late: bool) -> None:
    model = BalloonModel(MODERN | CONT | STATS | features, (128,) * queues, Quirks(late=late))
    device = started(model)
    device.inflate([Run(0x100, 512), Run(0x8000, 1)])
    assert model.inflated == {*range(0x100, 0x300), 0x8000}
    device.deflate([Run(0x100, 512)])
    assert model.inflated == {0x8000}
    device.stop()
    assert model.status == 0


@settings(max_examples=50)
@given(st.frozensets(st.integers(0, 1 << 16), min_size=1, max_size=1500), st.booleans())
def test_any_number_of_runs_goes_through(frames: frozenset[int], late: bool) -> None:
    model = BalloonModel(quirks=Quirks(late=late))
    device = started(model)
    # Single frames: the most entries that so many frames can make.
    singles = [Run(frame, 1) for frame in sorted(frames)]
    device.inflate(singles)
    assert model.inflated == frames
    device.deflate(from_frames(frames))
    assert not model.inflated


def test_indices_wrap_around() -> None:
    model = BalloonModel(sizes=(4,) * 5)
    device = started(model)
    for turn in range(0x10000 // 2 + 10):
        device.inflate([Run(turn, 1)])
        device.deflate([Run(turn, 1)])
    assert not model.inflated
    assert model.queues[3].next_used == (0x10000 // 2 + 10) % 0x10000
    # And past 65535 on one queue.
    for turn in range(0x10000 // 2):
        device.inflate([Run(turn, 1)])
        device.deflate([Run(turn, 1)])
    assert model.queues[3].next_used == 10


def test_a_synchronous_host_is_not_waited_for() -> None:
    model = BalloonModel()
    device = started(model)
    before = model.interrupts_enabled
    device.inflate([Run(1, 1)])
    assert model.interrupts_enabled == before
    assert model.interrupt_cause == 0


def test_configuration() -> None:
    model = BalloonModel()
    device = started(model)
    model.ask_for(1234)
    assert device.target() == 1234 * FRAME
    device.handle_interrupt()
    assert device.configuration_changed
    device.set_actual(5 * FRAME)
    assert model.actual_history == [5]


def test_news_of_the_configuration_that_come_with_a_completion_are_kept() -> None:
    model = BalloonModel(quirks=Quirks(late=True))
    device = started(model)
    model.ask_for(99)
    device.inflate([Run(1, 1)])
    assert device.configuration_changed


@pytest.mark.parametrize("features", [MODERN, MODERN | STATS | REPORTING, CONT | STATS])
def test_a_device_that_lacks_a_feature_is_refused_and_reset(features: int) -> None:
    model = BalloonModel(features)
    with pytest.raises(FeatureMissing, match=r"CONT_PAGES|bits 32"):
        BalloonDevice(model, Clock()).start()
    assert model.status == 0


def test_a_device_that_refuses_the_features_is_reset() -> None:
    model = BalloonModel(quirks=Quirks(refuse_features=True))
    with pytest.raises(FeatureMissing, match="refused"):
        BalloonDevice(model, Clock()).start()
    assert model.status == 0


def test_a_device_whose_queues_make_no_sense_is_reset() -> None:
    model = BalloonModel(sizes=(128,) * 3)
    with pytest.raises(DeviceMisbehaved, match="cannot tell which queues"):
        BalloonDevice(model, Clock()).start()
    assert model.status == 0


def test_a_device_that_does_not_reset_is_given_up_in_time() -> None:
    model = BalloonModel(quirks=Quirks(stuck_reset=True))
    clock = Clock()
    with pytest.raises(DeviceTimeout, match=f"{FAILED:#x}"):
        BalloonDevice(model, clock).start()
    assert clock.now < RESET_DEADLINE + 5


def test_a_device_that_does_not_answer_is_given_up_in_time() -> None:
    model = BalloonModel(quirks=Quirks(silent=True))
    clock = Clock()
    device = BalloonDevice(model, clock)
    device.start()
    begin = clock.now
    with pytest.raises(DeviceTimeout, match="no answer"):
        device.inflate([Run(1, 1)])
    assert clock.now - begin < ANSWER_DEADLINE + 5


@pytest.mark.parametrize(
    ("quirks", "words"),
    [(Quirks(wrong_id=True), "used id 135 was not given out"), (Quirks(index_jump=3), "used index went from 0 to 4 with 1 ")],
)
def test_a_device_that_lies_about_what_it_used_is_not_believed(quirks: Quirks, words: str) -> None:
    device = started(BalloonModel(quirks=quirks))
    with pytest.raises(DeviceMisbehaved, match=words):
        device.inflate([Run(1, 1)])


def test_a_configuration_that_never_holds_still_is_given_up() -> None:
    device = started(BalloonModel(quirks=Quirks(restless=True)))
    with pytest.raises(DeviceMisbehaved, match="config_generation"):
        device.target()


def test_a_device_that_needs_a_reset_is_noticed() -> None:
    model = BalloonModel()
    device = started(model)
    model.status |= NEEDS_RESET
    model.ask_for(1)
    with pytest.raises(DeviceMisbehaved, match="needs a reset"):
        device.handle_interrupt()


def test_a_device_that_was_reset_behind_our_back_is_noticed() -> None:
    model = BalloonModel()
    device = started(model)
    model.status = 0
    with pytest.raises(DeviceMisbehaved, match="reset by somebody else"):
        device.check_health()


def test_the_model_itself_notices_breaches() -> None:
    """A check that could not fail would prove nothing about the driver."""
    model = BalloonModel()
    device = started(model)
    device.inflate([Run(5, 1)])
    with pytest.raises(Breach, match="in the balloon"):
        device.inflate([Run(5, 1)])
    device = started(BalloonModel())
    with pytest.raises(Breach, match="not in the balloon"):
        device.deflate([Run(6, 1)])
    fresh = BalloonModel()
    with pytest.raises(Breach, match=r"3\.1\.1"):
        fresh.common.write(20, 1, 4)
    with pytest.raises(Breach, match="inside a field"):
        fresh.common.read(2, 2)
