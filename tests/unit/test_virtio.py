"""Registers, capabilities and the split queue, each alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balloon_agent.errors import ConfigurationInvalid, DeviceMisbehaved, UsedRingInvalid
from balloon_agent.virtio.capabilities import Region, layout
from balloon_agent.virtio.queue import Buffer, SplitQueue, wrapping_distance
from balloon_agent.virtio.registers import Window
from balloon_agent.virtio.spec import CommonConfiguration
from tests.device_model.config_space import COMMON, DEVICE, ISR, NOTIFY, PCI, Capability, config_space
from tests.device_model.parts import Page

WHOLE = (
    Capability(COMMON, 4, 0, 0x1000),
    Capability(ISR, 4, 0x1000, 0x1000),
    Capability(DEVICE, 4, 0x2000, 0x1000),
    Capability(NOTIFY, 4, 0x3000, 0x1000),
)


def test_the_layout_of_a_qemu_device() -> None:
    found = layout(bytes(config_space(WHOLE)))
    assert found.common == Region(4, 0, 0x1000)
    assert found.isr == Region(4, 0x1000, 0x1000)
    assert found.device == Region(4, 0x2000, 0x1000)
    assert found.notify == Region(4, 0x3000, 0x1000)
    assert found.notify_multiplier == 4
    assert found.bars() == {4}


def test_the_first_capability_of_a_type_counts_and_strange_ones_are_passed_over() -> None:
    config = config_space(
        [
            Capability(COMMON, 6, 0, 1),
            Capability(77, 0, 0, 1),
            Capability(PCI, 0, 0, 0),
            *WHOLE,
            Capability(COMMON, 0, 0x9000, 0x10),
        ]
    )
    assert layout(bytes(config)).common == Region(4, 0, 0x1000)


def test_a_device_without_modern_capabilities_is_refused_by_name() -> None:
    with pytest.raises(DeviceMisbehaved, match=r"no virtio 1\.x common, notify, isr, device"):
        layout(bytes(config_space([])))
    with pytest.raises(DeviceMisbehaved, match=r"no virtio 1\.x device capability"):
        layout(bytes(config_space([entry for entry in WHOLE if entry.kind != DEVICE])))


@pytest.mark.parametrize("multiplier", [1, 3, 6, 100])
def test_a_multiplier_that_is_none_is_refused(multiplier: int) -> None:
    with pytest.raises(DeviceMisbehaved, match="multiplier"):
        layout(bytes(config_space(WHOLE, multiplier=multiplier)))


def test_a_capability_list_that_goes_in_circles_ends() -> None:
    config = config_space(WHOLE)
    config[0x41] = 0x40
    with pytest.raises(DeviceMisbehaved, match="repeated"):
        layout(bytes(config))


@given(st.binary(min_size=0, max_size=256), st.data())
def test_no_configuration_space_does_worse_than_be_refused(noise: bytes, data: st.DataObject) -> None:
    config = config_space(WHOLE)
    for position, value in enumerate(noise):
        if data.draw(st.booleans()):
            config[position] = value
    try:
        found = layout(bytes(config[: data.draw(st.sampled_from((64, 200, 256)))]))
    except DeviceMisbehaved:
        return
    assert all(0 <= bar <= 5 for bar in found.bars())


def test_registers_are_accessed_at_their_own_width() -> None:
    memory = bytearray(range(64))
    window = Window(memoryview(memory), "common")
    assert window.get(CommonConfiguration.num_queues) == 0x1312
    window.set(CommonConfiguration.queue_desc, 0x1122334455667788)
    assert memory[32:40] == bytes.fromhex("8877665544332211")
    window.set(CommonConfiguration.device_status, 0xFF)
    assert memory[19:22] == bytes([19, 0xFF, 21])


@pytest.mark.parametrize(("offset", "width"), [(64, 1), (63, 2), (62, 4), (1, 2), (2, 4), (61, 4)])
def test_no_register_lies_outside_its_window_or_askew(offset: int, width: int) -> None:
    window = Window(memoryview(bytearray(64)), "isr")
    with pytest.raises(DeviceMisbehaved, match=f"isr: no {width}-byte register at {offset:#x}"):
        window.read(offset, width)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_free_running_indices_wrap(older: int, distance: int) -> None:
    assert wrapping_distance((older + distance) % 0x10000, older) == distance


def pages() -> list[Page]:
    return [Page(0x1000 * number, memoryview(bytearray(b"\xff" * 4096))) for number in (1, 2, 3)]


@pytest.mark.parametrize("size", [0, 3, 512, 100])
def test_a_queue_of_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationInvalid, match=f"queue_size of queue 0 is {size}, not a power of two from 1 to 256"):
        SplitQueue(0, size, pages())


@given(st.lists(st.integers(1, 4), max_size=60), st.randoms(use_true_random=False))
def test_buffers_return_in_any_order_and_none_is_lost(lengths: list[int], random: object) -> None:
    """Chains go out while there is room, come back in any order, and in the end every descriptor is free again."""
    shared = pages()
    queue = SplitQueue(0, 8, shared)
    used = shared[2].view
    out: list[int] = []
    index = 0

    def give_back() -> None:
        nonlocal index
        head = out.pop(random.randrange(len(out)))  # type: ignore[attr-defined]
        struct.pack_into("<II", used, 4 + 8 * (index % 8), head, 0)
        index = (index + 1) % 0x10000
        struct.pack_into("<H", used, 2, index)
        assert queue.completed() == [head]

    for length in lengths:
        chain = [Buffer(0x5000 + piece, 16) for piece in range(length)]
        while True:
            try:
                out.append(queue.add(chain))
                break
            except ValueError:
                give_back()
        assert queue.outstanding == len(out)
    while out:
        give_back()
    assert queue.outstanding == 0
    queue.add([Buffer(0x5000, 16)] * 8)
    with pytest.raises(ValueError, match="room for 0"):
        queue.add([Buffer(0x5000, 16)])


def test_a_used_buffer_cannot_be_used_twice() -> None:
    shared = pages()
    queue = SplitQueue(3, 8, shared)
    head, other = queue.add([Buffer(0x5000, 16)]), queue.add([Buffer(0x6000, 16)])
    struct.pack_into("<HHIIII", shared[2].view, 0, 0, 2, head, 0, head, 0)
    with pytest.raises(UsedRingInvalid, match=f"queue 3: used id {head} was not given out"):
        queue.completed()
    assert other != head
