"""The device model catches a driver that breaks a MUST: for each of them, a driver that does so, made by a small change.

A check of the model that no wrong driver could set off would be worth nothing; and if the driver changes so that one of these
changes cannot be made any more, this says so.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import NamedTuple

import pytest

from balloon_agent.balloon.channels import CHANNEL_NAMES
from balloon_agent.errors import BalloonError, DeviceNeedsReset
from balloon_agent.frames import FRAME
from tests.device_model.guest import MIB
from tests.device_model.model import MODERN
from tests.device_model.musts import MUSTS, Breach
from tests.device_model.numbering import CONT, DEFLATE_ON_OOM, HINT, MUST_TELL_HOST, REPORTING, STATS
from tests.device_model.parts import Quirks
from tests.device_model.world import BLOCK_SIZE, STATISTICS, World

OFFERED = MODERN | STATS | HINT | REPORTING | CONT | MUST_TELL_HOST


class Change(NamedTuple):
    """In ``module`` of the package, ``old`` stands once, and becomes ``new``."""

    module: str
    old: str
    new: str


DEVICE, QUEUE, REGISTERS = "virtio.device", "virtio.queue", "virtio.registers"
BALLOON_DEVICE, CHANNELS, WIRE, BALLOON = "balloon.device", "balloon.channels", "balloon.wire", "sizing.balloon"
POSTING, STATISTICS_QUEUE = "sizing.posting", "balloon.statistics_queue"
NEVER_WAIT = Change(BALLOON_DEVICE, "if heads := heads - {*queue.completed()}:", "if False:")
# What breaks each MUST.
MUTANTS: dict[str, list[Change]] = {
    "2.1.1 status": [Change(DEVICE, "Common.device_status, self.status() | bit)", "Common.device_status, bit)")],
    "2.1.1 needs reset": [Change(DEVICE, "if status == expected:", "if status & expected == expected:")],
    "2.2.1 features": [Change(DEVICE, "accepted = offered & (", "accepted = (")],
    "2.7 alignment": [
        Change(DEVICE, "Common.queue_device, queue.used.address)", "Common.queue_device, queue.used.address + 2)")
    ],
    "2.7 memory": [Change(DEVICE, "queue.descriptors.address)", "queue.descriptors.address + 4096)")],
    "2.7.4.2 order": [Change(CHANNELS, "device_writes=True)", "device_writes=run is batch[0])")],
    "2.7.5 length": [Change(CHANNELS, "[[Buffer(self._page.address, len(data))]]", "[[Buffer(self._page.address, 8192)]]")],
    "2.7.5.2 loop": [
        Change(QUEUE, "following = 0 if last else numbers[position + 1]", "following = 0 if last else numbers[0]")
    ],
    "2.7.6.1 index": [Change(QUEUE, "(self._available_index + 1) % _U16", "(self._available_index - 1) % _U16")],
    "2.7.8 used ring": [
        Change(
            QUEUE,
            "            heads.append(head)\n",
            "            heads.append(head)\n            self._used32[1 + 2 * slot] = 77\n",
        )
    ],
    "2.7.10.1 flags": [Change(QUEUE, "0 if on else _NO_INTERRUPT", "0 if on else 2")],
    "2.7.13 in use": [Change(QUEUE, "[self._free.pop() for _ in chain]", "self._free[-len(chain) :]")],
    "2.7.13 altered": [
        Change(
            BALLOON_DEVICE,
            "        # A synchronous host",
            "        queue.descriptors.view[:] = bytes(4096)\n        # A synchronous",
        )
    ],
    "3.1.1 order": [Change(DEVICE, "        self.add_status(Status.DRIVER)\n", "")],
    "3.1.1 late features": [
        Change(
            DEVICE,
            "        # Spec 3.1.1 step 6",
            "        self._common.set(Common.driver_feature, 0)\n        # Spec 3.1.1 step 6",
        ),
    ],
    "3.1.1 re-read": [Change(DEVICE, "if not self.status() & Status.FEATURES_OK:", "if False:")],
    "3.1.1 early notification": [
        Change(
            BALLOON_DEVICE,
            "        self.virtio.driver_ok()\n",
            "        self.virtio.notify(self._queues[0])\n        self.virtio.driver_ok()\n",
        )
    ],
    "3.1.1 bus master": [
        Change(
            BALLOON_DEVICE,
            "        self._reset()\n        self._transport.enable()\n",
            "        self._transport.enable()\n        self._reset()\n",
        )
    ],
    "4.1.3.1 width": [
        Change(REGISTERS, "self.write(field.offset, field.size, value)", "self.write(field.offset, 1, value & 255)")
    ],
    "4.1.4.3.2 read-only": [
        Change(
            DEVICE,
            "        count = self._common.get(Common.num_queues)\n",
            "        self._common.set(Common.num_queues, 7)\n        count = self._common.get(Common.num_queues)\n",
        )
    ],
    "4.1.4.3.2 configured first": [
        Change(
            DEVICE,
            "        self._common.set(Common.queue_desc,",
            "        self._common.set(Common.queue_enable, 1)\n        self._common.set(Common.queue_desc,",
        )
    ],
    "4.1.4.3.2 enable": [Change(DEVICE, "Common.queue_enable, 1)", "Common.queue_enable, 0)")],
    "4.1.4.3.2 power of two": [Change(DEVICE, "Common.queue_size, size)", "Common.queue_size, size - 1)")],
    "4.1.4.3.2 reset": [
        Change(DEVICE, "while (status := self._common.get(Common.device_status)) != 0:", "while status := 0:"),
    ],
    "4.1.5.1.3 size": [Change(DEVICE, "Common.queue_size, size)", "Common.queue_size, size * 2)")],
    "4.1.5.2 notification": [Change(DEVICE, "notify.write(self._notifiers[queue.index],", "notify.write(0,")],
    "5.5.2 queue": [Change(BALLOON_DEVICE, "self._queue(numbers.reporting,", "self._queue(numbers.reporting - 1,")],
    "5.5.4 configuration": [Change(BALLOON_DEVICE, "BalloonConfiguration.actual,", "BalloonConfiguration.num_pages,")],
    "5.5.6 frames": [
        Change(WIRE, 'struct.pack(f"<{len(frames)}I", *frames)', 'struct.pack(f"<{len(frames)}I", *(f * 8 for f in frames))')
    ],
    "5.5.6 unused": [
        Change(
            POSTING,
            "runs = split(join(runs_of(extents)), self._boundary, self._cuts)",
            "runs = iter([Run(run.first // 2, run.count) for run in join(runs_of(extents))])",
        )
    ],
    "5.5.6.1 use before inflate ack": [
        NEVER_WAIT,
        Change(
            BALLOON,
            "        # 3. Is it still what we posted?",
            "        for extent in told.whole:\n            self._sources[extent.source].give_back([extent])\n"
            "        # 3. Is it still what we posted?",
        ),
    ],
    "5.5.6.1 deflate before inflate ack": [NEVER_WAIT],
    "5.5.6.1 deflate queue": [
        Change(
            BALLOON,
            "        self._posting.deflate(extents)\n        # 2. To the guest",
            "        # 2. To the guest",
        )
    ],
    "5.5.6.1 tell host": [
        Change(
            BALLOON_DEVICE,
            "if heads := heads - {*queue.completed()}:",
            "if (heads := heads - {*queue.completed()}) and queue.index not in (1, 6):",
        )
    ],
    "5.5.6.1 below target": [Change(BALLOON, "while too_much > 0 and", "while too_much < 0 and")],
    "5.5.6.1 actual": [
        Change(
            BALLOON,
            "        self._host.set_actual(self.actual)\n        return Step(len(kept)",
            "        return Step(len(kept)",
        )
    ],
    "5.5.6.3.1 one buffer": [
        Change(BALLOON_DEVICE, "if self._statistics is None or not self._statistics.wanted:", "if self._statistics is None:")
    ],
    "5.5.6.3.1 first buffer": [Change(STATISTICS_QUEUE, "return self._queue.outstanding == 0", "return False")],
    "5.5.6.3.1 another buffer": [Change(STATISTICS_QUEUE, "return self._queue.outstanding == 0", "return self.tags is None")],
    "5.5.6.3.1 whole entries": [Change(WIRE, "_STATISTIC.pack(tag,", 'b"" if tag < 0 else struct.pack("<IQ", tag,')],
    "5.5.6.3.1 same set": [
        Change(
            STATISTICS_QUEUE,
            "data = pack_statistics(statistics)",
            "data = pack_statistics(dict(list(statistics.items())[self._queue._available_index :]))",
        )
    ],
    "5.5.6.7.1 use before ack": [NEVER_WAIT],
    "5.5.6.7.1 writable": [
        Change(CHANNELS, "[[Buffer(self._page.address, len(data))]]", "[[Buffer(self._page.address, len(data), True)]]")
    ],
    "6.1 version 1": [Change(DEVICE, "(accepted >> (32 * select))", "(accepted >> (64 * select))")],
    "RFC entry": [Change(WIRE, "_ENTRY.pack(run.first, run.size)", "_ENTRY.pack(run.first, run.count)")],
}


def everything(channel: str, *, late: bool, oom: bool) -> None:
    """All that a driver does in its life, on a device that is well and then is not."""
    features = OFFERED | (DEFLATE_ON_OOM if oom else 0)
    world = World(features, channel, quirks=Quirks(late=late, slow_reset=2))
    model = world.model
    world.start()
    for turn in range(3):
        # Blocks, huge pages, single pages; then a part of a block, which has to be made up for.
        for size in (2 * BLOCK_SIZE + 5 * MIB + 3 * FRAME, BLOCK_SIZE, BLOCK_SIZE - MIB, 0, 33 * MIB):
            world.follow(size)
            # Whether the host wants them or not.
            world.device.give_stats(STATISTICS)
            assert model.ask_for_stats()
            world.listen()
            model.at_rest(size // FRAME)
        if turn == 2:
            # Memory that moved is withdrawn, target or not.
            world.sources["pages"].moved, model.check_floor = True, False
            world.follow(33 * MIB + FRAME)
        model.break_down()
        noticed = False
        try:
            world.listen()
            world.balloon.step(0)
        except DeviceNeedsReset:
            noticed = True
        assert noticed
        world.start()
    world.follow(0)
    world.device.stop()
    world.check()


Scenario = Callable[[], None]


def scenarios() -> Iterator[Scenario]:
    for channel, late, oom in itertools.product(CHANNEL_NAMES, (False, True), (False, True)):
        yield lambda channel=channel, late=late, oom=oom: everything(channel, late=late, oom=oom)  # type: ignore[misc]


@pytest.mark.parametrize("oom", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_the_driver_as_it_is_breaks_nothing(channel: str, late: bool, oom: bool) -> None:
    everything(channel, late=late, oom=oom)


def test_there_is_a_mutant_for_every_must() -> None:
    assert MUTANTS.keys() == MUSTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_driver_that_breaks_it_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in {change.module for change in MUTANTS[name]}:
        mutate(f"balloon_agent.{module}", [change for change in MUTANTS[name] if change.module == module], monkeypatch)
    caught: set[str] = set()
    for scenario in scenarios():
        try:
            scenario()
        except Breach as breach:
            caught.add(breach.name)
        except (BalloonError, ValueError, AssertionError):
            continue  # other checks may be quicker, in some scenarios
    assert name in caught, f"caught were {caught or 'none'}"


def mutate(name: str, changes: list[Change], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the functions of a module the code that they would have with the changes."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    for change in changes:
        assert source.count(change.old) == 1, f"{name} has {source.count(change.old)} times {change.old!r}"
        source = source.replace(change.old, change.new)
    changed = ModuleType(name)
    changed.__package__ = module.__package__
    monkeypatch.setitem(sys.modules, name, changed)
    exec(compile(source, str(module.__file__), "exec"), vars(changed))
    monkeypatch.setitem(sys.modules, name, module)
    theirs = dict(functions(changed, name))
    for path, function in functions(module, name):
        monkeypatch.setattr(function, "__code__", theirs[path].__code__)


def functions(scope: ModuleType | type, module: str) -> Iterator[tuple[str, FunctionType]]:
    """Every function that a module defines, with its path."""
    for key, value in vars(scope).items():
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, staticmethod):
            value = value.__func__
        if isinstance(value, FunctionType) and value.__module__ == module and value.__code__.co_filename.endswith(".py"):
            yield f"{scope.__name__}.{key}", value
        elif isinstance(value, type) and value.__module__ == module:
            yield from ((f"{scope.__name__}.{path}", function) for path, function in functions(value, module))
