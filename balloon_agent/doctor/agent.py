"""The agent itself: its options, another one that runs, what an earlier one has left, and its sockets."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from balloon_agent.api.snapshot import State
from balloon_agent.errors import BalloonError
from balloon_agent.options import parse_listen
from balloon_agent.paths import SOCKET_NAME
from balloon_agent.size import format_size
from balloon_agent.takeover.state import StateFile

from .machine import (
    Finding,
    Machine,
    fail,
    ok,
    warn,
)

# sun_path of unix(7), less the zero at its end, and what a holder's socket adds to the run directory.
LONGEST_FOLDER = 107 - len("/holders/01234567-1234567")
_LISTENING = "0A"


def options(machine: Machine) -> Finding:
    if machine.problem is not None:
        return fail(machine.problem, "mend it: balloon-agent run --help says what there is")
    return ok(f"{machine.file} makes sense" if machine.file else "the defaults: no --config is given")


def agent(machine: Machine) -> Finding:
    pid, status = machine.agent, machine.status
    if pid is None:
        return ok("none runs")
    if isinstance(status, dict):
        if status["state"] == State.ABSENT:
            return warn(
                f"process {pid} waits for a balloon: {status['shortfall']}", "its log says what keeps it from one that is there"
            )
        if machine.balloon is not None and status["device"] != machine.balloon.address:
            return warn(f"process {pid} has {machine.options.run_dir} for {status['device']}", "give each its own --run-dir")
        size = format_size(int(status["actual_bytes"]))
        return ok(f"process {pid} runs, {status['state']}, with {size} in the balloon")
    if machine.owner is None:
        return warn(f"process {pid} has the device, with another run directory", "say which with --run-dir")
    return machine.bad(f"process {pid} has the device and does not answer: {status}", f"see its log, and end it: kill {pid}")


def left_behind(machine: Machine) -> Finding:
    if machine.agent is not None:
        return ok("what is on record is the running agent's")
    folder = machine.options.run_dir
    try:
        state = StateFile(folder / "state.json")
    except BalloonError as error:
        return fail(error.found, error.remedy)
    holders = sum(1 for _ in (folder / "holders").iterdir()) if (folder / "holders").is_dir() else 0
    parts = [f"{address} taken from {driver or 'no driver'}" for address, driver in state.previous_drivers.items()]
    parts += [f"{len(state.blocks)} blocks offline"] if state.blocks else []
    parts += [f"{name} was {changed.before}" for name, changed in state.sysctls.items()]
    parts += [f"{added} huge pages of {format_size(size)}" for size, (_, added) in state.pools.items()]
    parts += [f"{holders} holders"] if holders else []
    if parts:
        return warn(
            f"an earlier agent has left: {', '.join(parts)}",
            "balloon-agent run goes on with it, balloon-agent restore undoes it",
        )
    return ok("nothing")


def control_socket(machine: Machine) -> Finding:
    path = machine.options.run_dir / SOCKET_NAME
    if len(str(path.parent).encode()) > LONGEST_FOLDER:
        return fail(f"{path.parent} is too long for the sockets in it", f"choose a --run-dir of at most {LONGEST_FOLDER} bytes")
    if isinstance(machine.status, dict):
        return ok(f"{path} answers")
    return ok(f"{path} is to be had")


def metrics_port(machine: Machine) -> Finding:
    listen = machine.options.metrics_listen
    if machine.agent is not None:
        return ok(f"{listen} is the running agent's")
    host, port = parse_listen(listen)
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:
        # A name: whoever has the port may have its address.
        wanted = None
    for address, used in _listeners(machine):
        if used == port and (wanted is None or address in (wanted, _mapped(wanted)) or _any(address) or _any(wanted)):
            return fail(
                f"somebody listens on {address} port {port} already, where metrics are to be served",
                f"ss -ltnp sport = {port} says who; or another metrics-listen",
            )
    return ok(f"{listen} is free")


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _any(address: Address) -> bool:
    return address.is_unspecified


def _mapped(address: Address) -> Address | None:
    return ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed) if address.version == 4 else None


def _listeners(machine: Machine) -> Iterator[tuple[Address, int]]:
    """Who listens: Documentation/networking/proc_net_tcp.rst. Each word of an address is in the processor's byte order."""
    for name in ("tcp", "tcp6"):
        for line in (machine.read(f"proc/self/net/{name}") or "").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTENING:
                address, _, port = local.partition(":")
                words = [address[at : at + 8] for at in range(0, len(address), 8)]
                yield ipaddress.ip_address(b"".join(bytes.fromhex(word)[::-1] for word in words)), int(port, 16)
