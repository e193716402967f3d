"""The kernel's settings while memory is held, on a directory that stands for /proc/sys."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from balloon_agent.guest.shared_sysctls import Changed, SharedSettings
from balloon_agent.guest.sysctls import (
    OVERCOMMIT,
    SCALE_FACTOR,
    Settings,
    oom_killer_chooses,
    put_back,
)

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
    """A kernel with its settings, and an agent there: a record of what it has changed, and what it holds."""

    def __init__(self, root: Path, name: str = "first") -> None:
        self.root = root
        self.run_dir = root / name
        self.run_dir.mkdir()
        # Who has something on record counts.
        (self.run_dir / "state.json").touch()
        if not (root / "zoneinfo").exists():
            (root / "sys/vm").mkdir(parents=True)
            (root / "zoneinfo").write_text(ZONEINFO)
            for setting, value in (("min_free_kbytes", 4000), ("watermark_scale_factor", 10), ("overcommit_memory", 0)):
                self.write(setting, value)
        self.shared = SharedSettings(root / "locks/shared", str(self.run_dir))
        self.record: dict[str, Changed] = {}
        self.reserve = 64 * MIB
        self.held = Held()
        self.settings = self.make()

    def make(self, *, warns_early: bool = True, overcommits: bool = True) -> Settings:
        return Settings(
            self.held,
            GIB,
            lambda: self.reserve,
            self.note,
            dict(self.record),
            self.shared,
            warns_early=warns_early,
            overcommits=overcommits,
            proc_root=self.root,
            thp_enabled=str(self.root / "none"),
        )

    def note(self, name: str, changed: Changed | None) -> None:
        if changed is None:
            self.record.pop(name, None)
        else:
            assert changed.written[0] == self.read(name.removeprefix("vm.")), "on record before it is changed"
            self.record[name] = changed

    def was(self) -> dict[str, int]:
        """What is on record to be put back."""
        return {name: changed.before for name, changed in self.record.items()}

    def die(self) -> None:
        """Another agent follows, and knows what is on record."""
        self.settings = self.make()

    def restore(self) -> None:
        for name, changed in list(self.record.items()):
            put_back(name, changed, self.shared, str(self.root / "sys"))
            del self.record[name]

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
    assert world.was() == {SCALE_FACTOR: 10}
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
    assert world.was()[OVERCOMMIT] == 0
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
    assert world.was() == {SCALE_FACTOR: 10, OVERCOMMIT: 0}
    world.settings = world.make()
    world.hold(100 * MIB, 128 * MIB)
    assert world.was() == {SCALE_FACTOR: 10, OVERCOMMIT: 0}
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


# -- what somebody else has changed since an agent died ---------------------------------------------------------------


@pytest.mark.parametrize("by", ["the next agent", "restore"])
def test_what_was_changed_after_an_agent_died_is_left_alone(world: World, by: str) -> None:
    world.hold(100 * MIB, 128 * MIB)
    world.write("overcommit_memory", 2)
    world.write("watermark_scale_factor", 77)
    if by == "restore":
        world.restore()
    else:
        world.die()
        world.hold(200 * MIB, 128 * MIB)
        world.hold(0, 0)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (2, 77)
    assert world.record == {}


@pytest.mark.parametrize("by", ["the next agent", "restore"])
@pytest.mark.parametrize("value", [310, 10])
def test_an_agent_that_died_before_or_after_the_write_is_undone(world: World, by: str, value: int) -> None:
    world.hold(100 * MIB, 0)
    assert world.record[SCALE_FACTOR] == Changed(10, (10, 310))
    # It is on record, and may not have been written.
    world.write("watermark_scale_factor", value)
    if by == "restore":
        world.restore()
    else:
        world.die()
        world.hold(100 * MIB, 0)
        assert world.read("watermark_scale_factor") == 310
        world.hold(0, 0)
    assert world.read("watermark_scale_factor") == 10
    assert world.record == {}


@pytest.mark.parametrize("by", ["the next agent", "restore"])
def test_what_an_earlier_version_has_written_is_believed_to_be_there(world: World, by: str) -> None:
    world.record = {SCALE_FACTOR: Changed(10)}
    world.write("watermark_scale_factor", 620)
    if by == "restore":
        world.restore()
    else:
        world.die()
        world.hold(0, 0)
    assert world.read("watermark_scale_factor") == 10


# -- two agents on one machine -----------------------------------------------------------------------------------------

DEEDS = ("first holds", "second holds", "first ends", "second ends")
ORDERS = [
    order
    for order in itertools.permutations(DEEDS)
    if all(order.index(f"{who} holds") < order.index(f"{who} ends") for who in ("first", "second"))
]


@pytest.mark.parametrize("reserves", [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("ends", ["by itself", "by restore", "by the next agent"])
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_of_two_agents_neither_leaves_anything_behind(
    tmp_path: Path, order: Sequence[str], reserves: tuple[int, int], ends: str
) -> None:
    agents = {name: World(tmp_path, name) for name in ("first", "second")}
    # Half of the reserve, in 1/10000 of the 896 MiB that are online.
    wants = {name: {64: 350, 128: 710}[reserve] for name, reserve in zip(agents, reserves, strict=True)}
    for agent, reserve in zip(agents.values(), reserves, strict=True):
        agent.reserve = reserve * MIB
    holding: set[str] = set()
    for deed in order:
        name, _, what = deed.partition(" ")
        agent = agents[name]
        if what == "holds":
            holding.add(name)
            agent.hold(0, 128 * MIB)
        else:
            holding.discard(name)
            if ends == "by restore":
                agent.restore()
            elif ends == "by the next agent":
                agent.die()
            if ends != "by restore":
                agent.hold(0, 0)
        # As high as any of them wants, whoever came and went; also once each has looked at it again.
        for _ in range(2):
            assert agent.read("watermark_scale_factor") == max((wants[each] for each in holding), default=10)
            assert agent.read("overcommit_memory") == int(bool(holding))
            for each in holding:
                agents[each].hold(0, 128 * MIB)
    assert all(agent.record == {} for agent in agents.values())


def test_an_agent_of_which_nothing_is_left_wants_nothing(tmp_path: Path) -> None:
    first, second = World(tmp_path, "first"), World(tmp_path, "second")
    first.hold(0, 128 * MIB)
    second.hold(0, 128 * MIB)
    (first.run_dir / "state.json").unlink()
    second.hold(0, 0)
    assert (second.read("overcommit_memory"), second.read("watermark_scale_factor")) == (0, 10)


def test_a_shared_file_that_is_damaged_is_as_none(world: World) -> None:
    world.hold(0, 128 * MIB)
    for text in ("", "{", "[]", '{"vm.overcommit_memory": 7}'):
        (world.root / "locks/shared").write_text(text)
        world.hold(0, 256 * MIB)
    world.hold(0, 0)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (0, 10)


@pytest.mark.parametrize("forged", ["link", "another name", "open to all", "locked"])
def test_a_shared_file_that_is_not_ours_alone_is_not_believed(
    world: World, forged: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = world.root / "locks/shared"
    path.parent.mkdir()
    fd = -1
    if forged == "link":
        path.symlink_to(world.root / "elsewhere")
    else:
        path.touch(0o600)
        if forged == "open to all":
            path.chmod(0o666)
        elif forged == "another name":
            (world.root / "precious").hardlink_to(path)
        else:
            fd = os.open(path, os.O_RDWR)
            fcntl.flock(fd, fcntl.LOCK_EX)
    world.hold(0, 128 * MIB)
    assert (world.read("overcommit_memory"), world.read("watermark_scale_factor")) == (0, 10)
    assert len(caplog.messages) == 2
    assert not (world.root / "elsewhere").exists()
    if fd >= 0:
        os.close(fd)
        world.hold(0, 128 * MIB)
        assert world.read("overcommit_memory") == 1
