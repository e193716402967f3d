"""The driver against a device that was written from the specification."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balloon_agent.balloon.channels import CHANNEL_NAMES
from balloon_agent.balloon.device import ANSWER_DEADLINE, LOOK_INTERVAL, BalloonDevice
from balloon_agent.balloon.wire import StatisticTag
from balloon_agent.errors import (
    BadInput,
    ConfigurationInvalid,
    DeviceFailed,
    DeviceGone,
    DeviceMisbehaved,
    DeviceNeedsReset,
    DeviceTaken,
    DeviceTimeout,
    DeviceWasReset,
    FeatureMissing,
    UsedRingInvalid,
)
from balloon_agent.frames import FRAME, Run, from_frames
from balloon_agent.virtio.device import RESET_DEADLINE
from tests.device_model.model import FAILED, MODERN, BalloonModel
from tests.device_model.musts import Breach
from tests.device_model.numbering import CONT, DEFLATE_ON_OOM, HINT, MUST_TELL_HOST, REPORTING, SCHEMES, STATS, fixed, qemu
from tests.device_model.parts import Quirks

EVERYTHING = MODERN | CONT | STATS | HINT | REPORTING | MUST_TELL_HOST
STATISTICS = {StatisticTag.FREE_MEMORY: 1 << 30, StatisticTag.TOTAL_MEMORY: 2 << 30}


def device_for(model: BalloonModel, channel: str = "auto", frames_per_buffer: int = 256) -> BalloonDevice:
    return BalloonDevice(model, channel, frames_per_buffer, model.clock)


def started(model: BalloonModel, channel: str = "auto", frames_per_buffer: int = 256) -> BalloonDevice:
    device = device_for(model, channel, frames_per_buffer)
    device.start()
    return device


class SlowHost(BalloonModel):
    """Answers each notification just in time."""

    def wait_interrupt(self, timeout: float) -> bool:
        self.clock.now += ANSWER_DEADLINE - 1
        return super().wait_interrupt(timeout)


def test_between_the_answers_of_a_slow_host_the_driver_says_that_it_is_alive() -> None:
    """Whoever watches it would take it for dead if a whole step passed without a word."""
    model = SlowHost(quirks=Quirks(late=True))
    said: list[float] = []
    device = BalloonDevice(model, "classic", clock=model.clock, alive=lambda: said.append(model.clock.now))
    device.start()
    begin = model.clock.now
    device.inflate([Run(0x200, 30000)])
    times = [begin, *said, model.clock.now]
    assert times[-1] - begin > 5 * ANSWER_DEADLINE
    assert max(later - earlier for earlier, later in pairwise(times)) < ANSWER_DEADLINE


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("quirks", [{}, {"late": True}, {"late": True, "backwards": True}, {"slow_reset": 3}], ids=str)
def test_memory_goes_and_comes_back_by_every_channel(channel: str, scheme: str, quirks: dict[str, Any]) -> None:
    model = BalloonModel(EVERYTHING, SCHEMES[scheme](EVERYTHING), quirks=Quirks(**quirks))
    device = started(model, channel)
    assert device.channel_name == channel
    device.give_stats(STATISTICS)
    device.inflate([Run(0x200, 5000), Run(0x8000, 1)])
    assert not model.busy
    if channel == "reporting":
        assert model.reported_frames == 5001
        assert not model.inflated
    else:
        assert model.inflated == {*range(0x200, 0x200 + 5000), 0x8000}
    device.deflate([Run(0x200, 512)])
    if channel != "reporting":
        assert model.inflated == {*range(0x400, 0x200 + 5000), 0x8000}
    model.at_rest(0)
    device.stop()
    assert device.quiet
    assert model.status == 0


@pytest.mark.parametrize(
    ("features", "channel"),
    [(CONT | REPORTING, "cont"), (REPORTING, "reporting"), (0, "classic"), (HINT, "classic"), (CONT, "cont")],
)
def test_the_best_channel_is_chosen(features: int, channel: str) -> None:
    assert started(BalloonModel(MODERN | features)).channel_name == channel


@pytest.mark.parametrize(("channel", "name", "bit"), [("cont", "CONT_PAGES", 6), ("reporting", "REPORTING", 5)])
def test_a_channel_that_the_device_does_not_offer_is_refused_and_the_device_reset(channel: str, name: str, bit: int) -> None:
    model = BalloonModel(MODERN)
    with pytest.raises(FeatureMissing, match=rf"does not offer {name} \(feature bit {bit}, .* --channel auto"):
        device_for(model, channel).start()
    assert model.status == 0


def test_only_what_is_needed_is_negotiated() -> None:
    expected = {"cont": CONT | MUST_TELL_HOST, "reporting": REPORTING, "classic": MUST_TELL_HOST}
    for channel, features in expected.items():
        model = BalloonModel(EVERYTHING | 1 << 4 | 1 << 7 | 1 << 28 | 1 << 34)
        started(model, channel)
        assert model.accepted == MODERN | STATS | features


@pytest.mark.parametrize(
    ("features", "chooses", "bears"),
    [
        (DEFLATE_ON_OOM, True, True),
        (DEFLATE_ON_OOM, False, False),
        (DEFLATE_ON_OOM | MUST_TELL_HOST, True, False),
        (0, True, False),
    ],
)
def test_what_is_held_is_offered_to_an_oom_killer_that_chooses_if_the_host_may_be_told_later(
    features: int, chooses: bool, bears: bool
) -> None:
    device = started(BalloonModel(MODERN | CONT | features))
    device.oom_killer_chooses = chooses
    assert device.bears_loss == bears


def test_wrong_options_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown channel x"):
        BalloonDevice(BalloonModel(), "x")
    with pytest.raises(BadInput, match="100 frames per buffer: 256 or 512"):
        BalloonDevice(BalloonModel(), "classic", 100)


@settings(max_examples=50)
@given(st.frozensets(st.integers(0, 1 << 16), min_size=1, max_size=1500), st.booleans(), st.sampled_from(CHANNEL_NAMES))
def test_any_number_of_runs_goes_through(frames: frozenset[int], late: bool, channel: str) -> None:
    model = BalloonModel(EVERYTHING, quirks=Quirks(late=late))
    device = started(model, channel)
    # Single frames: the most entries that so many frames can make.
    singles = [Run(frame, 1) for frame in sorted(frames)]
    device.inflate(singles)
    if channel == "reporting":
        assert model.reported_frames == len(frames)
    else:
        assert model.inflated == frames
    device.deflate(from_frames(frames))
    assert not model.inflated


@pytest.mark.parametrize(("frames_per_buffer", "largest"), [(256, 1024), (512, 2048)])
def test_a_host_that_ignores_large_buffers_is_never_sent_one(frames_per_buffer: int, largest: int) -> None:
    model = BalloonModel(MODERN, quirks=Quirks(most_frames=frames_per_buffer))
    device = started(model, frames_per_buffer=frames_per_buffer)
    device.inflate([Run(0, 100_000)])
    assert model.largest_buffer == largest


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_a_host_that_needs_its_classic_queues_gets_them(channel: str) -> None:
    """Whichever are used: cloud-hypervisor does not come to life without."""
    model = BalloonModel(EVERYTHING, quirks=Quirks(needs_classic_queues=True))
    started(model, channel).inflate([Run(1, 1)])
    assert model.reported_frames or model.inflated


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_queues_of_one_entry_do(channel: str) -> None:
    roles = qemu(EVERYTHING)
    model = BalloonModel(EVERYTHING, roles, [1] * len(roles))
    device = started(model, channel)
    device.give_stats(STATISTICS)
    device.inflate([Run(0, 3000), Run(0x8000, 1)])
    device.deflate([Run(0, 3000)])
    assert model.inflated == (set() if channel == "reporting" else {0x8000})


@pytest.mark.slow
def test_indices_wrap_around() -> None:
    roles = qemu(MODERN | CONT | STATS)
    model = BalloonModel(roles=roles, sizes=[4] * 5)
    device = started(model)
    for turn in range(0x10000 + 10):
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


def test_an_interrupt_that_got_lost_costs_time_and_nothing_else() -> None:
    model = BalloonModel(quirks=Quirks(late=True, lost_interrupts=True))
    device = started(model)
    begin = model.clock.now
    device.inflate([Run(1, 1)])
    assert model.inflated == {1}
    assert LOOK_INTERVAL <= model.clock.now - begin < 2 * LOOK_INTERVAL


def test_configuration() -> None:
    model = BalloonModel()
    device = started(model)
    model.ask_for(1234)
    assert device.target() == 1234 * FRAME
    assert model.interrupts() == 1
    device.handle_interrupt()
    assert device.configuration_changed
    device.set_actual(5 * FRAME)
    assert model.actual_history == [5]


def test_news_of_the_configuration_that_come_while_waiting_are_not_lost() -> None:
    model = BalloonModel(quirks=Quirks(late=True))
    device = started(model)
    model.on_notification = lambda model: model.ask_for(7)
    device.inflate([Run(1, 1)])
    assert device.configuration_changed


# -- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_there_from_the_start_and_after_each_use() -> None:
    model = BalloonModel()
    device = started(model)
    with pytest.raises(Breach, match="first buffer"):
        model.at_rest(0)
    assert device.stats_wanted
    for turn in range(300):
        device.give_stats({StatisticTag.FREE_MEMORY: turn, StatisticTag.CACHES: 5})
        assert not device.stats_wanted
        # Asked or not, there is never a second one.
        device.give_stats({StatisticTag.FREE_MEMORY: 0, StatisticTag.CACHES: 5})
        model.at_rest(0)
        assert model.statistics == {4: turn, 7: 5}
        assert model.ask_for_stats()
        assert model.interrupts() == 1
        device.handle_interrupt()
        assert device.stats_wanted
        with pytest.raises(Breach, match="another buffer"):
            model.at_rest(0)


def test_another_set_of_statistics_is_no_way_to_answer() -> None:
    model = BalloonModel()
    device = started(model)
    device.give_stats({StatisticTag.FREE_MEMORY: 1})
    model.ask_for_stats()
    with pytest.raises(ValueError, match="CACHES"):
        device.give_stats({StatisticTag.CACHES: 1})


def test_a_device_without_statistics_is_given_none() -> None:
    device = started(BalloonModel(MODERN | CONT))
    assert not device.stats_wanted
    device.give_stats(STATISTICS)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_device_that_refuses_the_features_is_reset() -> None:
    model = BalloonModel(quirks=Quirks(refuse_features=True))
    with pytest.raises(FeatureMissing, match=r"refused the feature bits 0x\w+ of 0x"):
        device_for(model).start()
    assert model.status == 0


def test_a_device_whose_queues_make_no_sense_is_reset() -> None:
    model = BalloonModel(roles=["inflate", "deflate", "stats"])
    with pytest.raises(ConfigurationInvalid, match="cannot tell which queue is which"):
        device_for(model).start()
    assert model.status == 0


@pytest.mark.parametrize(
    ("roles", "sizes", "words"),
    [
        (["inflate"] * 65, [128] * 65, "num_queues is 65, more than the 64"),
        (qemu(MODERN | CONT), [128, 128, 128, 100, 128], "queue_size of queue 3 is 100, not a power of two"),
    ],
)
def test_registers_out_of_their_range_are_named_with_value_and_limit(
    roles: Sequence[str | None], sizes: list[int], words: str
) -> None:
    with pytest.raises(ConfigurationInvalid, match=words):
        device_for(BalloonModel(roles=roles, sizes=sizes)).start()


def test_a_device_that_does_not_reset_is_cut_off_and_given_up_in_time() -> None:
    model = BalloonModel(quirks=Quirks(stuck_reset=True))
    device = device_for(model)
    with pytest.raises(DeviceTimeout, match=f"device_status is still {FAILED:#x} 5 s after a reset, not 0"):
        device.start()
    assert not device.quiet
    assert device.cut_off
    assert model.clock.now < RESET_DEADLINE + 5
    # The same for one that was at work, and could reach memory until now.
    model.quirks.stuck_reset = False
    device.start()
    assert model.bus_master
    model.quirks.stuck_reset = True
    with pytest.raises(DeviceTimeout):
        device.stop()
    assert not model.bus_master


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_a_device_that_does_not_answer_is_given_up_in_time(channel: str) -> None:
    model = BalloonModel(EVERYTHING, quirks=Quirks(silent=True))
    device = started(model, channel)
    begin = model.clock.now
    with pytest.raises(DeviceTimeout, match=r"queue \d: no answer to 1 buffers within 30 s"):
        device.inflate([Run(1, 1)])
    assert model.clock.now - begin < ANSWER_DEADLINE + 5


@pytest.mark.parametrize(
    ("quirks", "words"),
    [
        (Quirks(wrong_id=True), "used id 135 was not given out"),
        (Quirks(repeated_id=True), "used id 1 was not given out"),
        (Quirks(index_jump=3), "used index went from 0 to 4, with at most 1 "),
    ],
)
def test_a_device_that_lies_about_what_it_used_is_not_believed(quirks: Quirks, words: str) -> None:
    device = started(BalloonModel(quirks=quirks))
    with pytest.raises(UsedRingInvalid, match=words):
        device.inflate([Run(1, 1)])


def test_a_configuration_that_never_holds_still_is_given_up() -> None:
    model = BalloonModel(quirks=Quirks(restless=True))
    with pytest.raises(ConfigurationInvalid, match="config_generation did not stay the same over a read, 16 times"):
        device_for(model).start()
    assert model.status == 0


def test_a_device_that_needs_a_reset_is_noticed() -> None:
    model = BalloonModel()
    device = started(model)
    model.break_down()
    with pytest.raises(DeviceNeedsReset, match="device_status is 0x4f, not 0xf: it needs a reset"):
        device.handle_interrupt()


@pytest.mark.parametrize("late", [False, True])
def test_a_device_that_fails_in_the_middle_is_noticed_at_once(late: bool) -> None:
    model = BalloonModel(quirks=Quirks(late=late))
    device = started(model)
    model.on_notification = lambda model: model.break_down()
    begin = model.clock.now
    with pytest.raises(DeviceNeedsReset):
        device.inflate([Run(1, 1)])
    model.on_notification = lambda model: None
    device.start()
    model.on_notification = lambda model: model.reset_by_host()
    with pytest.raises(DeviceWasReset, match="device_status is 0x0, not 0xf: it was reset by somebody else"):
        device.inflate([Run(1, 1)])
    assert model.clock.now - begin < 5


def test_a_device_that_is_gone_is_noticed() -> None:
    model = BalloonModel()
    device = started(model)
    model.quirks.unplugged = True
    with pytest.raises(DeviceGone, match=r"device_status is 0xff: .* unplugged"):
        device.handle_interrupt()
    with pytest.raises(DeviceGone):
        device.stop()
    assert not device.quiet


def test_the_registers_of_a_device_that_was_removed_are_not_touched() -> None:
    model = BalloonModel()
    device = started(model)
    model.quirks.removed = True
    for call in (device.handle_interrupt, device.stop, device.start):
        with pytest.raises(DeviceGone):
            call()
    # What is not there can do nothing to memory.
    assert device.quiet


def test_a_device_that_somebody_else_has_taken_is_not_touched_and_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BalloonModel()
    device = started(model)

    def taken() -> None:
        raise DeviceTaken("bound to virtio-pci now")

    monkeypatch.setattr(model, "check_present", taken)
    for call in (device.handle_interrupt, device.stop, device.start):
        with pytest.raises(DeviceTaken):
            call()
    assert model.status == 15
    assert not device.quiet


def test_memory_that_comes_back_by_report_is_not_taken_from_a_device_that_was_reset() -> None:
    model = BalloonModel(EVERYTHING)
    device = started(model, "reporting")
    device.inflate([Run(1, 1)])
    model.reset_by_host()
    with pytest.raises(DeviceWasReset):
        device.deflate([Run(1, 1)])


def test_a_device_can_be_started_again_and_again_without_new_pages() -> None:
    model = BalloonModel(EVERYTHING)
    device = started(model, "classic")
    pages = len(model.memory)
    for fault in (model.break_down, model.reset_by_host, lambda: None) * 3:
        device.give_stats(STATISTICS)
        device.inflate([Run(1, 100)])
        fault()
        device.start()
        assert not model.inflated
    assert len(model.memory) == pages


def test_every_failure_has_a_name_of_its_own() -> None:
    kinds = [DeviceFailed, DeviceMisbehaved, ConfigurationInvalid, UsedRingInvalid, DeviceNeedsReset, DeviceWasReset]
    kinds += [DeviceGone, DeviceTimeout]
    assert len({kind.kind for kind in kinds}) == len(kinds)


def test_registers_outside_of_their_window_are_refused() -> None:
    model = BalloonModel(roles=fixed(CONT | STATS), features=MODERN | CONT | STATS)
    model.notify.size = 12
    with pytest.raises(ConfigurationInvalid, match="queue 5 is notified at 0x14, outside the notify region of 0xc bytes"):
        device_for(model).start()
