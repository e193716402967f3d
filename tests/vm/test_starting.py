"""A start that goes on with what another agent left, stopped or killed at any instant: nothing is lost, or handed out twice."""

from __future__ import annotations

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BALLOON_DEVICE, BIN, agent_command
from tests import instants
from tests.vm.conftest import MEMORY_MIB, Stage, kernel_driver_works, nothing_left
from tests.vm.tools import pattern

INSTANTS = 40
BLOCKS = 3
TARGET_MIB = BLOCKS * 128 + 40


@pytest.fixture
def guest(stage: Stage) -> VirtualMachine:
    return stage.machine("starting", lambda: VirtualMachine(MEMORY_MIB, devices=[BALLOON_DEVICE], cache=True))


@pytest.mark.long
def test_a_start_may_end_at_any_instant(guest: VirtualMachine) -> None:
    guest.set_balloon(MEMORY_MIB - TARGET_MIB)
    with pattern(guest):
        output = guest.run([str(BIN / "python"), str(instants.__file__), str(INSTANTS)], timeout=3600).check()
        instants.check(output.out, INSTANTS, TARGET_MIB << 20, BLOCKS)
        assert guest.balloon_actual() >> 20 == MEMORY_MIB - TARGET_MIB
        guest.set_balloon(MEMORY_MIB)
        guest.run(agent_command("restore"), timeout=300).check()
    nothing_left(guest)
    kernel_driver_works(guest)
