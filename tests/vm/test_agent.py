"""The whole agent in a real machine: real QEMU, real kernel, real memory, and a process that would notice corruption."""

from __future__ import annotations

import json
import signal
import time

import pytest

from contrib.vm import VirtualMachine
from contrib.vm.experiment import (
    BALLOON_DEVICE,
    HUGE_PAGES,
    REPORTING_DEVICE,
    SMALL_PAGES,
    agent_command,
    ctl_command,
    run,
    running_agent,
)
from contrib.vm.workload import guestmem
from tests.vm.conftest import MEMORY_MIB, driver_of_balloon, kernel_driver_works
from tests.vm.tools import HUGE, SMALL, comes_back_huge, pattern, scrape, status


def test_memory_is_intact_while_the_balloon_breathes(machine: VirtualMachine) -> None:
    with pattern(machine), running_agent(machine):
        # Odd sizes: a tail of single pages. A block up and down: whole and in part.
        for guest in (600, 1024, 601, 777, 553, 1000, 640):
            machine.set_balloon(guest)
            machine.wait_balloon(guest, 120)
            held = status(machine)["held_bytes"]
            assert isinstance(held, dict)
            assert sum(held.values()) == (MEMORY_MIB - guest) << 20
        figures = scrape(machine)
        assert figures["balloon_target_bytes"] == figures["balloon_actual_bytes"] == 384 << 20
        assert sum(value for name, value in figures.items() if name.startswith("balloon_held_bytes")) == 384 << 20
        assert figures["balloon_verify_failures_total"] == 0
    kernel_driver_works(machine)


def test_memory_is_intact_without_whole_blocks(machine: VirtualMachine) -> None:
    with pattern(machine), running_agent(machine, "--sources", "thp,pages"):
        for guest in (700, 1024, 801, 900):
            machine.set_balloon(guest)
            machine.wait_balloon(guest, 120)
        held = status(machine)["held_bytes"]
        assert isinstance(held, dict)
        assert not held.get("blocks")


def test_memory_really_goes_back_to_the_host(machine: VirtualMachine) -> None:
    # All of the guest's free memory is the host's expense, once it has been touched.
    user = machine.start([str(guestmem()), "touch", "700", "--huge"], keep_stdin=True)
    user.wait_for("ready", 120)
    user.close_stdin()
    user.wait(60).check()
    with running_agent(machine):
        before = machine.guest_ram().rss_kib
        machine.set_balloon(500)
        machine.wait_balloon(500, 120)
        gained = before - machine.guest_ram().rss_kib
        # What the host had not had to back before cannot come back; and the agent has touched a little meanwhile.
        untouched = (MEMORY_MIB << 10) - before
        assert gained >= ((MEMORY_MIB - 500 - 16) << 10) - untouched


def test_the_balloon_is_set_by_hand(machine: VirtualMachine) -> None:
    with running_agent(machine):
        done = machine.run(ctl_command("set", "100M", "--json")).check()
        assert json.loads(done.out)["actual_bytes"] == 100 << 20
        machine.wait_balloon(MEMORY_MIB - 100, 60)
        # The host's target does not matter until it is followed again.
        machine.set_balloon(900)
        machine.run(ctl_command("follow")).check()
        machine.wait_balloon(900, 60)
        refused = machine.run(ctl_command("set", "3G"))
        assert refused.code == 1
        assert refused.err.count("\n") == 1
        assert "up to the guest's" in refused.err
        machine.run(ctl_command("set", "0")).check()


def test_the_reserve_stays_with_the_guest(machine: VirtualMachine) -> None:
    with running_agent(machine, "--reserve", "300M"):
        short = machine.run(ctl_command("set", "900M", "--timeout", "60", "--json"))
        assert short.code == 3, short
        assert "300 MiB of it are kept in reserve" in short.err
        now = json.loads(short.out)
        assert now["state"] == "short"
        # Memory that becomes free is taken up later, and memory that is needed is not taken away: the reserve is there.
        user = machine.start([str(guestmem()), "touch", "200"], keep_stdin=True)
        user.wait_for("ready", 60)
        user.close_stdin()
        user.wait(60).check()


def test_an_agent_that_is_killed_is_followed_by_one_that_goes_on(machine: VirtualMachine) -> None:
    with pattern(machine):
        machine.set_balloon(600)
        first = machine.start(agent_command("run"))
        first.wait_for("is to have 424 MiB", 120)
        # In the middle of the inflate, wherever that is.
        first.signal(signal.SIGKILL)
        first.wait(60)
        assert driver_of_balloon(machine) == "uio_pci_generic"
        with running_agent(machine):
            machine.wait_balloon(600, 120)
            machine.set_balloon(1024)
            machine.wait_balloon(1024, 120)
    kernel_driver_works(machine)


def test_an_agent_that_is_killed_at_rest_leaves_its_balloon_to_the_next(machine: VirtualMachine) -> None:
    with pattern(machine):
        machine.set_balloon(599)
        first = machine.start(agent_command("run"))
        # Not what the host sees: the kernel's driver has been there before.
        first.wait_for("the balloon has 425 MiB", 120)
        first.signal(signal.SIGKILL)
        first.wait(60)
        with running_agent(machine) as second:
            second.wait_for("an earlier agent left 425 MiB in the balloon", 60)
            assert status(machine)["actual_bytes"] == 425 << 20
            machine.set_balloon(1024)
            machine.wait_balloon(1024, 120)


def test_a_holder_that_is_killed_is_noticed_and_the_balloon_refilled(machine: VirtualMachine) -> None:
    with pattern(machine), running_agent(machine, "--sources", "thp,pages") as agent:
        machine.set_balloon(900)
        machine.wait_balloon(900, 120)
        machine.shell("kill -9 $(pgrep -f balloon_agent.memory.holde[r])")
        agent.wait_for("has died", 60)
        deadline = time.monotonic() + 60
        # A worker may be the first whose death is noticed.
        while (now := status(machine))["actual_bytes"] != 124 << 20 or now["holders_lost_total"] != 1:
            assert time.monotonic() < deadline, now
        machine.set_balloon(1024)
        machine.wait_balloon(1024, 60)


def test_sigterm_gives_everything_back(machine: VirtualMachine) -> None:
    with running_agent(machine) as agent:
        machine.set_balloon(700)
        machine.wait_balloon(700, 60)
        agent.signal(signal.SIGTERM)
        assert agent.wait(120).code == 0
        assert "back with virtio-pci" in agent.err
    # The kernel's driver has it again, and does what the host asks.
    machine.wait_balloon(700, 60)
    machine.set_balloon(MEMORY_MIB)
    machine.wait_balloon(MEMORY_MIB, 60)


@pytest.mark.parametrize("ends", ["next agent", "restore"])
def test_a_balloon_that_is_kept_outlives_the_agent(machine: VirtualMachine, ends: str) -> None:
    settings = "cat /proc/sys/vm/overcommit_memory /proc/sys/vm/watermark_scale_factor /proc/sys/vm/min_free_kbytes"
    before = machine.shell(settings)
    with pattern(machine):
        with running_agent(machine, "--on-stop", "keep") as first:
            machine.run(ctl_command("set", "300M"), timeout=120).check()
            first.signal(signal.SIGTERM)
            assert first.wait(120).code == 0
            assert "300 MiB stay in the balloon, for the next agent" in first.err
        assert driver_of_balloon(machine) == "uio_pci_generic"
        assert machine.balloon_actual() >> 20 == MEMORY_MIB - 300
        assert machine.shell(settings) != before
        if ends == "restore":
            machine.run(agent_command("restore"), timeout=120).check()
            kernel_driver_works(machine)
        else:
            with running_agent(machine) as second:
                second.wait_for("an earlier agent left 300 MiB in the balloon", 60)
                # Set by hand, as it was.
                now = status(machine)
                assert (now["mode"], now["actual_bytes"]) == ("manual", 300 << 20)
                machine.run(ctl_command("follow"), timeout=120).check()
            kernel_driver_works(machine)
    assert machine.shell(settings) == before


# -- what goes wrong -------------------------------------------------------------------------------------------------


def refused(machine: VirtualMachine, *arguments: str) -> str:
    """The one line with which the agent refuses to run; the kernel's driver must have the device, and obey."""
    result = machine.run(agent_command("run", *arguments), timeout=120)
    assert result.code == 1, result
    errors = [line for line in result.err.splitlines() if "error:" in line]
    assert len(errors) == 1, result.err
    return errors[0]


def test_a_wrong_device_is_refused(machine: VirtualMachine) -> None:
    line = refused(machine, "--device", "0000:00:00.0")
    assert "0000:00:00.0 is not a virtio balloon" in line
    kernel_driver_works(machine)


def test_a_wrong_size_is_refused(machine: VirtualMachine) -> None:
    assert "'12q' is no size" in refused(machine, "--reserve", "12q")
    assert driver_of_balloon(machine) == "virtio-pci"


def test_balloonctl_without_an_agent_says_so(machine: VirtualMachine) -> None:
    result = machine.run(ctl_command("status"))
    assert result.code == 4
    assert result.err.count("\n") == 1
    assert "start it with `balloon-agent run`" in result.err


def test_a_second_agent_is_refused(machine: VirtualMachine) -> None:
    with running_agent(machine) as agent:
        result = machine.run(agent_command("run"))
        assert result.code == 1
        assert f"used by another agent already, process {agent.pid}" in result.err
        machine.set_balloon(1000)
        machine.wait_balloon(1000, 60)
        machine.set_balloon(1024)
        machine.wait_balloon(1024, 60)


def test_a_port_in_use_gives_the_device_back(machine: VirtualMachine) -> None:
    program = "import socket, sys; s = socket.create_server(('127.0.0.1', 9758)); print('up', flush=True); sys.stdin.read()"
    squatter = machine.start(["python3", "-I", "-S", "-c", program], keep_stdin=True)
    squatter.wait_for("up", 60)
    assert "choose another --metrics-listen" in refused(machine)
    squatter.close_stdin()
    squatter.wait(60)
    kernel_driver_works(machine)


def test_a_kernel_without_uio_pci_generic_is_refused(machine: VirtualMachine) -> None:
    machine.shell(
        "rmmod uio_pci_generic uio 2>/dev/null || true; mount -t tmpfs none /lib/modules/$(uname -r)/kernel/drivers/uio"
    )
    try:
        line = refused(machine)
        assert "the kernel has no driver uio_pci_generic" in line
        assert "CONFIG_UIO_PCI_GENERIC" in line
    finally:
        machine.shell("umount /lib/modules/$(uname -r)/kernel/drivers/uio")
    kernel_driver_works(machine)


def test_a_user_who_is_not_root_is_refused(machine: VirtualMachine) -> None:
    program = (
        "import os, sys; from balloon_agent.cli.agent import main; import balloon_agent.agent.run;"
        " os.setuid(65534); sys.exit(main(['run']))"
    )
    python = agent_command()[0].replace("balloon-agent", "python")
    result = machine.run([python, "-c", program])
    assert result.code == 1
    assert "must run as root, not as user 65534" in result.err
    assert driver_of_balloon(machine) == "virtio-pci"


# -- the experiment ----------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize(
    ("driver", "memory", "options"),
    [
        ("kernel", HUGE_PAGES, ()),
        ("agent", HUGE_PAGES, ()),
        pytest.param("agent", HUGE_PAGES, ("--channel", "reporting"), marks=pytest.mark.long),
        pytest.param("agent", HUGE_PAGES, ("--channel", "classic"), marks=pytest.mark.long),
        pytest.param("kernel", SMALL_PAGES, (), marks=pytest.mark.long),
        pytest.param("agent", SMALL_PAGES, (), marks=pytest.mark.long),
        pytest.param("agent", SMALL_PAGES, ("--channel", "reporting"), marks=pytest.mark.long),
        pytest.param("agent", SMALL_PAGES, ("--channel", "classic"), marks=pytest.mark.long),
    ],
)
def test_the_experiment(driver: str, memory: str, options: tuple[str, ...]) -> None:
    """The proposal's experiment on machines of their own: what the agent must do, and what the kernel's driver does not."""
    lines: list[str] = []
    device = REPORTING_DEVICE if "reporting" in options else BALLOON_DEVICE
    result = run(driver, lines.append, memory, device, options=options)
    assert result.actual_mib == {"600": 600.0, "1024": 1024.0}
    if driver == "agent":
        assert result.lost_thp_kib <= 16 << 10, (result, lines)
        assert result.host_free_gained_kib >= 280 << 10, result
        # Told frame by frame, the host discards frame by frame, and what comes back of that is as this host makes it.
        again = comes_back_huge(SMALL if "classic" in options else HUGE)
        assert result.anon_huge_kib["reused"] >= result.anon_huge_kib["touched" if again else "inflated"], result
    else:
        # If the kernel's driver lost nothing, the experiment would show nothing.
        assert result.lost_thp_kib >= 200 << 10, result
        assert result.host_free_gained_kib < 100 << 10, result
