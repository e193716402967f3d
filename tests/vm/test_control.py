"""The control socket of a running agent, and balloonctl on a terminal."""

from __future__ import annotations

import json
from pathlib import Path

from contrib.vm import VirtualMachine
from contrib.vm.experiment import BIN, STEP_DEADLINE, ctl_command, running_agent
from tests.vm.conftest import MEMORY_MIB

PYTHON = str(BIN / "python")
SOCKET = "/run/balloon-agent/control"
FOLDER = Path(__file__).parent
MESSAGES = 1000


def descriptors(machine: VirtualMachine, pid: int) -> int:
    return int(machine.shell(f"ls /proc/{pid}/fd | wc -l"))


def test_a_thousand_hostile_messages_of_a_hundred_clients_do_not_move_the_balloon(machine: VirtualMachine) -> None:
    with running_agent(machine) as agent:
        pid = json.loads(machine.run(ctl_command("status", "--json")).check().out)["pid"]
        before = descriptors(machine, pid)
        crowd = machine.start([PYTHON, str(FOLDER / "hostile.py"), SOCKET, str(MESSAGES)])
        while crowd.code is None:
            for size in (MEMORY_MIB - 400, MEMORY_MIB - 100, MEMORY_MIB - 333):
                machine.set_balloon(size)
                machine.wait_balloon(size, STEP_DEADLINE)
        result = json.loads(crowd.wait(STEP_DEADLINE).check().out)
        assert result["sent"] == MESSAGES, result
        assert result["refused"] > MESSAGES // 4, result
        assert result["good"] > 0, result
        assert agent.code is None
        status = json.loads(machine.run(ctl_command("status", "--json")).check().out)
        assert (status["pid"], status["mode"], status["actual_bytes"]) == (pid, "follow", 333 << 20)
        # One of the client's own may still be about to be closed; a hundred are not.
        assert descriptors(machine, pid) <= before + 10
        assert "defect" not in agent.err
        assert "Traceback" not in agent.err


def test_every_command_on_a_terminal(machine: VirtualMachine) -> None:
    # With so much in reserve that these commands, which use some of it, are not in need of memory: that is a reason, too.
    with running_agent(machine, "--sources", "thp,pages", "--reserve", "128M"):
        session = machine.run([PYTHON, str(FOLDER / "terminal.py")], timeout=STEP_DEADLINE)
        assert session.code == 0, session.out + session.err
        assert "all of them" in session.out
        # Interrupted, balloonctl leaves the agent to go on with what it was told.
        machine.wait_balloon(MEMORY_MIB - 700, STEP_DEADLINE)
        machine.run(ctl_command("follow"), timeout=STEP_DEADLINE).check()
