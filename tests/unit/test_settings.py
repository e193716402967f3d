"""The kernel's settings while memory is held, on a directory that stands for /proc/sys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from balloon_agent.memory.settings import OVERCOMMIT, SCALE_FACTOR, Settings, oom_killer_chooses

GIB, MIB = 1 << 30, 1 << 20
ZONEINFO = """Node 0, zone    DMA32
  pages free     100000
        min      5632
        low      7040
        managed  262144
"""


@dataclass
class Held:
    size: int = 0
    in_use: int = 0


class World:
    """A kernel with its settings, a record of what they were, and what is held."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "sys/vm").mkdir(parents=True)
        (root / "zoneinfo").write_text(ZONEINFO)
        self.record: dict[str, int] = {}
        self.held = Held()
        for name, value in (("min_free_kbytes", 4000), ("watermark_scale_factor", 10), ("overcommit_memory", 0)):
            self.write(name, value)
        self.settings = self.make()

    def make(self, *, warns_early: bool = True, overcommits: bool = True) -> Settings:
        return Settings(
            self.held,
            GIB,
            lambda: 64 * MIB,
            self.note,
            dict(self.record),
            warns_early=warns_early,
            overcommits=overcommits,
            proc_root=self.root,
        )

    def note(self, name: str, before: int | None) -> None:
        if before is None:
            self.record.pop(name, None)
        else:
            assert self.read(name.removeprefix("vm.")) == before, "on record before it is changed"
            self.record[name] = before

    def read(self, name: str) -> int:
        return int((self.root / "sys/vm" / name).read_text())

    def write(self, name: str, value: int) -> None:
        (self.root / "sys/vm" / name).write_text(f"{value}\n")

    def hold(self, in_use: int, offline: int) -> None:
        self.held.size, self.held.in_use = in_use + offline, in_use
        self.settings.follow()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_early_warning_is_earlier_while_anything_is_held(world: World) -> None:
    world.hold(0, 0)
    assert world.read("watermark_scale_factor") == 10
    assert world.record == {}
    world.hold(100 * MIB, 0)
    # Half of the reserve, in 1/10000 of a GiB, a little less.
    assert world.read("watermark_scale_factor") == 310
    assert world.record == {SCALE_FACTOR: 10}
    world.hold(0, 0)
    assert world.read("watermark_scale_factor") == 10
    assert world.record == {}


def test_what_is_offline_makes_the_share_larger(world: World) -> None:
    world.hold(0, 512 * MIB)
    assert world.read("watermark_scale_factor") == 620


def test_offline_blocks_do_not_make_the_kernel_refuse_mappings(world: World) -> None:
    world.hold(100 * MIB, 0)
    assert world.read("overcommit_memory") == 0
    world.hold(100 * MIB, 128 * MIB)
    assert world.read("overcommit_memory") == 1
    assert world.record[OVERCOMMIT] == 0
    world.hold(100 * MIB, 0)
    assert world.read("overcommit_memory") == 0
    assert OVERCOMMIT not in world.record


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_policy_that_somebody_has_chosen_stays(world: World, chosen: int) -> None:
    world.write("overcommit_memory", chosen)
    world.hold(0, 128 * MIB)
    assert world.read("overcommit_memory") == chosen
    assert OVERCOMMIT not in world.record


def test_what_somebody_else_changes_meanwhile_is_left_alone(world: World) -> None:
    world.hold(100 * MIB, 128 * MIB)
    world.write("overcommit_memory", 2)
    world.write("watermark_scale_factor", 77)
    world.hold(200 * MIB, 128 * MIB)
    world.hold(0, 0)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (2, 77)
    assert world.record == {}


def test_the_next_agent_puts_back_what_the_last_one_changed(world: World) -> None:
    world.hold(100 * MIB, 128 * MIB)
    assert world.record == {SCALE_FACTOR: 10, OVERCOMMIT: 0}
    world.settings = world.make()
    world.hold(100 * MIB, 128 * MIB)
    assert world.record == {SCALE_FACTOR: 10, OVERCOMMIT: 0}
    world.hold(0, 0)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (0, 10)
    assert world.record == {}


def test_what_is_not_wanted_is_not_changed(world: World) -> None:
    world.settings = world.make(warns_early=False, overcommits=False)
    world.hold(100 * MIB, 128 * MIB)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (0, 10)


def test_a_setting_that_the_kernel_does_not_have_is_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    (world.root / "sys/vm/watermark_scale_factor").unlink()
    world.hold(100 * MIB, 0)
    world.hold(200 * MIB, 0)
    assert len([line for line in caplog.messages if SCALE_FACTOR in line]) == 1


def test_an_oom_killer_that_takes_whoever_asks_looks_for_nobody(world: World) -> None:
    root = str(world.root / "sys")
    assert oom_killer_chooses(root)
    world.write("oom_kill_allocating_task", 1)
    assert not oom_killer_chooses(root)
    world.write("oom_kill_allocating_task", 0)
    assert oom_killer_chooses(root)
