"""balloonctl: see and set the balloon by hand."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balloon_agent import __version__
from balloon_agent.errors import AgentUnreachable, BadInput, BalloonError
from balloon_agent.service.control import LONGEST_WAIT, SOCKET_NAME, ask
from balloon_agent.sizing.size import format_size, parse_size, parse_wish

# Exit codes. 2 is argparse's for a wrong command line.
REACHED, REFUSED, FELL_SHORT, NO_AGENT = 0, 1, 3, 4
ANSWER_DEADLINE = 35.0  # seconds: longer than the agent takes to say that it is busy


def parser() -> argparse.ArgumentParser:
    """The command line, also for its help text."""
    top = argparse.ArgumentParser(prog="balloonctl", description="See and set the balloon of this guest by hand.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--run-dir",
        type=Path,
        default=Path("/run/balloon-agent"),
        help="where the agent's socket is (default: %(default)s)",
    )
    common.add_argument("--json", action="store_true", help="print the whole status as JSON")
    waiting = argparse.ArgumentParser(add_help=False)
    waiting.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the balloon (default: %(default)g)",
    )
    waiting.add_argument("--no-wait", action="store_true", help="return as soon as the agent knows")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("status", parents=[common], help="what the balloon holds, and why")
    change = commands.add_parser("set", parents=[common, waiting], help="set the balloon's size, whatever the host asks")
    which = change.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "size",
        metavar="SIZE",
        nargs="?",
        help="424M, 1.5GiB; +64M or -64M: more or less than it is to have now; 25%%: of the guest's memory",
    )
    which.add_argument("--guest", metavar="SIZE", help="what the guest is to keep, as QEMU's monitor counts")
    commands.add_parser("follow", parents=[common, waiting], help="follow the host's target again")
    commands.add_parser("hold", parents=[common, waiting], help="stay at the size of this moment, whatever the host asks")
    commands.add_parser("deflate", parents=[common, waiting], help="give everything back to the guest, whatever the host asks")
    return top


def describe(status: dict[str, Any]) -> str:
    """A status for people."""
    held = ", ".join(f"{source} {format_size(size)}" for source, size in status["held_bytes"].items()) or "nothing"
    lines = [
        f"balloon  {format_size(status['actual_bytes'])} of {format_size(status['target_bytes'])} ({status['reason']})",
        f"state    {status['state']}, mode {status['mode']}",
        f"held     {held}",
        f"host     asks for {format_size(status['host_target_bytes'])}",
        f"device   {status['device']} through {status['driver']}, told of memory by its {status['channel']} queues",
        f"agent    {status['version']}, process {status['pid']}",
    ]
    if status["unpinned"]:
        lines.append("UNPINNED what is held may be moved, and the host discards memory of others then: for experiments only")
    if status["shortfall"]:
        lines.append(f"short    {status['shortfall']}")
    if any(status["device_faults_total"].values()):
        faults = ", ".join(f"{kind} {count}" for kind, count in status["device_faults_total"].items() if count)
        lines.append(f"faults   {faults}")
    lines += [f"note     {source}: {note}" for source, note in status["source_notes"].items()]
    return "\n".join(lines)


def _size(arguments: argparse.Namespace, path: Path) -> int:
    """The size that the balloon is to have. BadInput if that makes no sense."""
    if arguments.guest is None and arguments.size[-1:] != "%" and arguments.size[:1] not in ("+", "-"):
        return parse_size(arguments.size)
    status = ask(path, {"op": "status"}, ANSWER_DEADLINE)
    if arguments.guest is None:
        return parse_wish(arguments.size, status["target_bytes"], status["ram_bytes"])
    machine = int(status["machine_bytes"])
    size = machine - parse_size(arguments.guest)
    if size < 0:
        raise BadInput(f"{arguments.guest!r} is more than the {format_size(machine)} that the machine has")
    return size


def perform(arguments: argparse.Namespace) -> int:
    """Carry out one command. BalloonError for what cannot be done."""
    path = arguments.run_dir / SOCKET_NAME
    # Before anything is changed: a command is carried out whole or not at all.
    if not 0 <= getattr(arguments, "timeout", 0) <= LONGEST_WAIT:
        raise BadInput(f"--timeout {arguments.timeout:g} is not from 0 to {LONGEST_WAIT:g} seconds")
    request: dict[str, Any] = {"op": arguments.command}
    if arguments.command == "set":
        request["size"] = _size(arguments, path)
    elif arguments.command == "deflate":
        request = {"op": "set", "size": 0}
    status = ask(path, request, ANSWER_DEADLINE)
    code = REACHED
    if arguments.command != "status" and not arguments.no_wait:
        status = ask(path, {"op": "wait", "timeout": arguments.timeout}, arguments.timeout + ANSWER_DEADLINE)
        if status["actual_bytes"] != status["target_bytes"] or status["state"] == "failed":
            code = FELL_SHORT
            missing = abs(status["target_bytes"] - status["actual_bytes"])
            print(
                f"balloonctl: short by {format_size(missing)}: {status['shortfall'] or 'not there yet, see --timeout'}",
                file=sys.stderr,
            )
    print(json.dumps(status, indent=2) if arguments.json else describe(status))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 refused, 2 a wrong command line, 3 fell short of the size, 4 no agent."""
    words = sys.argv[1:] if argv is None else argv
    # What begins with a minus is an option to argparse, unless there is a space in it.
    arguments = parser().parse_args([f" {word}" if re.match(r"-\d", word) else word for word in words])
    if getattr(arguments, "size", None) is not None:
        arguments.size = arguments.size.strip()
    try:
        return perform(arguments)
    except AgentUnreachable as error:
        print(f"balloonctl: error: {error}", file=sys.stderr)
        return NO_AGENT
    except BalloonError as error:
        print(f"balloonctl: error: {error}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
