"""``balloon-agent doctor`` in a guest that is well, in one that is not, and beside an agent."""

from __future__ import annotations

import json
import shlex
import signal
from typing import Any

from contrib.vm import VirtualMachine
from contrib.vm.experiment import STEP_DEADLINE, agent_command
from tests.vm.conftest import MEMORY_MIB, address_of_balloon, kernel_driver_works

Findings = dict[str, dict[str, Any]]
# All that an agent changes in a guest, and modules.
STATE = """
readlink /sys/bus/pci/devices/{address}/driver || true
cat /sys/bus/pci/devices/{address}/driver_override /sys/kernel/mm/hugepages/*/nr_hugepages
cat /sys/devices/system/memory/memory*/state
grep -r . /proc/sys/vm 2>/dev/null || true
cut -d' ' -f1 /proc/modules
ls /run/balloon-agent /run/balloon-agent-locks 2>/dev/null || true
"""
# What happens to the process and its surroundings, and to nobody else.
FAULTS = """
umount -l /sys/kernel/tracing; umount -l /sys/kernel/debug
ulimit -n 500
sh -c 'echo $PPID' >/sys/fs/cgroup/doctor/cgroup.procs
"""
UNPRIVILEGED = "exec setpriv --bounding-set -sys_admin,-ipc_lock"


def doctor(machine: VirtualMachine, before: str = ":", within: str = "exec") -> tuple[int, Findings]:
    """Exit code, and findings by check; in a mount namespace of its own where ``before`` is done. The guest stays as it is."""
    state = STATE.format(address=address_of_balloon(machine))
    command = f"{within} {shlex.join(agent_command('doctor', '--json'))}"
    script = (
        f"state() {{ {state} }}\nstate >/run/then\n(\n{before}\n{command}\n)\ncode=$?\nstate | diff /run/then - >&2\nexit $code"
    )
    output = machine.run(["unshare", "-m", "sh", "-c", script])
    assert output.err == ""
    findings = json.loads(output.out)
    assert all(finding.keys() == {"check", "level", "found", "remedy"} for finding in findings)
    assert all((finding["level"] == "ok") == (finding["remedy"] is None) for finding in findings)
    return output.code, {finding["check"]: finding for finding in findings}


def levels(findings: Findings) -> dict[str, str]:
    return {check: finding["level"] for check, finding in findings.items()}


def test_what_is_wrong_in_a_guest_is_said_and_nothing_else(machine: VirtualMachine) -> None:
    address = address_of_balloon(machine)
    code, well = doctor(machine)
    assert code == 0
    assert "fail" not in levels(well).values(), well
    assert well["driver"]["found"].startswith("virtio-pci, with virtio_balloon")
    assert "STATS_VQ" in well["features"]["found"]

    listener = "import socket, time; s = socket.create_server(('127.0.0.1', 9758)); print('up', flush=True); time.sleep(3600)"
    server = machine.start(["python3", "-I", "-S", "-c", listener])
    server.wait_for("up", STEP_DEADLINE)
    machine.shell(
        f"echo {address} >/sys/bus/pci/devices/{address}/driver/unbind; echo 1 >/proc/sys/vm/panic_on_oom\n"
        "echo +memory >/sys/fs/cgroup/cgroup.subtree_control\n"
        "mkdir /sys/fs/cgroup/doctor; echo 100M >/sys/fs/cgroup/doctor/memory.max"
    )
    try:
        code, ill = doctor(machine, FAULTS, UNPRIVILEGED)
    finally:
        machine.shell(
            f"echo 0 >/proc/sys/vm/panic_on_oom; rmdir /sys/fs/cgroup/doctor; echo {address} >/sys/bus/pci/drivers_probe"
        )
        server.signal(signal.SIGKILL)
        server.wait(STEP_DEADLINE)
    assert code == 1
    changed = {check: level for check, level in levels(ill).items() if level != levels(well).get(check)}
    assert changed == {
        "driver": "warn",
        "pagemap": "fail",
        "capabilities": "fail",
        "locked-memory": "fail",
        "open-files": "fail",
        "control-group": "fail",
        "panic-on-oom": "warn",
        "hidden-memory": "warn",
        "tracepoints": "warn",
        "metrics-port": "fail",
    }, ill
    # Without a driver nobody knows.
    assert well.keys() - ill.keys() == {"deflate-on-oom"}
    assert ill["driver"]["found"] == f"{address} has no driver: nobody drives the balloon"
    assert ill["features"]["found"].startswith("what the device offers is not known")
    assert "frame number 0" in ill["pagemap"]["found"]
    assert ill["open-files"]["found"] == "this process may have 500 files open"
    assert ill["control-group"]["found"].startswith("/sys/fs/cgroup/doctor/memory.max is 100 MiB")
    assert ill["tracepoints"]["remedy"] == "mount -t tracefs none /sys/kernel/tracing"
    assert "listens on 127.0.0.1 port 9758" in ill["metrics-port"]["found"]
    kernel_driver_works(machine)


def test_who_is_not_root_is_told_what_needs_root(machine: VirtualMachine) -> None:
    machine.shell("mkdir -p /run/balloon-agent; chmod 700 /run/balloon-agent")
    code, findings = doctor(machine, within="exec setpriv --reuid 65534 --regid 65534 --clear-groups")
    assert code == 0
    needing = {check for check, finding in findings.items() if finding["remedy"] == "run this as root"}
    # The guest's modules are where the harness keeps them, which may be for root alone to look into.
    assert needing - {"module"} == {
        "pagemap",
        "capabilities",
        "locked-memory",
        "tracepoints",
        "psi",
        "left-behind",
        "hidden-memory",
    }, findings
    assert findings["user"]["level"] == "warn"
    assert "fail" not in levels(findings).values()


def test_an_agent_is_seen_at_work_and_by_what_it_leaves(machine: VirtualMachine) -> None:
    agent = machine.start(agent_command("run"))
    agent.wait_for("driving", STEP_DEADLINE)
    machine.set_balloon(MEMORY_MIB - 128)
    machine.wait_balloon(MEMORY_MIB - 128, STEP_DEADLINE)
    code, beside = doctor(machine)
    agent.signal(signal.SIGKILL)
    agent.wait(STEP_DEADLINE)
    after_code, after = doctor(machine)
    machine.run(agent_command("restore")).check()
    assert code == 0
    assert beside["agent"]["found"] == f"process {agent.pid} runs, resting, with 128 MiB in the balloon"
    assert beside["driver"]["found"] == f"uio_pci_generic, for the agent that runs, process {agent.pid}"
    assert "CONT_PAGES" in beside["features"]["found"]
    assert beside["features"]["level"] == beside["metrics-port"]["level"] == beside["left-behind"]["level"] == "ok"
    assert after_code == 0
    assert after["agent"]["found"] == "none runs"
    assert after["driver"]["level"] == after["left-behind"]["level"] == "warn"
    assert f"{address_of_balloon(machine)} taken from virtio-pci, 1 blocks offline" in after["left-behind"]["found"]
    kernel_driver_works(machine)
