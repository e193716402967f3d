"""All of balloonctl's commands."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from balloon_agent import __version__
from balloon_agent.api.client import ask, ask_status
from balloon_agent.api.snapshot import State
from balloon_agent.errors import AgentUnreachable, BadInput, BalloonError
from balloon_agent.paths import DEFAULT_RUN_DIR, SOCKET_NAME
from balloon_agent.size import format_size, parse_size, parse_wish

# Exit codes. 2 is argparse's for a wrong command line.
REACHED, REFUSED, FELL_SHORT, NO_AGENT = 0, 1, 3, 4
ANSWER_DEADLINE = 35.0  # seconds: longer than the agent takes to say that it is busy
LONGEST_WAIT = 3600.0
SHELLS = ("bash", "zsh")
# What begins like a size with a sign is one, and no option.
_LESS = re.compile(r"-\d")
SIZE_HELP = "424M, 1.5GiB; +64M or -64M: more or less than it is to have now; 25%%: of the guest's memory"
EXIT_CODES = "Exit codes: 0 done or reached, 1 refused, 2 wrong command line, 3 fell short (and why), 4 no agent."


def parser() -> argparse.ArgumentParser:
    """The command line, also for its help text, man page and completion."""
    top = argparse.ArgumentParser(
        prog="balloonctl", description="See and set the balloon of this guest by hand.", epilog=EXIT_CODES
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--run-dir",
        type=Path,
        default=Path(DEFAULT_RUN_DIR),
        metavar="DIR",
        help="where the agent's socket is (default: %(default)s)",
    )
    common.add_argument("--json", action="store_true", help="print JSON, for programs")
    waiting = argparse.ArgumentParser(add_help=False)
    waiting.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for the balloon (default: %(default)g)",
    )
    waiting.add_argument("--no-wait", action="store_true", help="return as soon as the agent knows")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common, *parents], help=text, description=f"{text[0].upper()}{text[1:]}.")

    add("status", "what the balloon holds, and why")
    change = add("set", "set the balloon's size, whatever the host asks", waiting)
    which = change.add_mutually_exclusive_group(required=True)
    which.add_argument("size", metavar="SIZE", nargs="?", help=SIZE_HELP)
    which.add_argument("--guest", metavar="SIZE", help="what the guest is to keep, as QEMU's monitor counts")
    add("follow", "follow the host's target again", waiting)
    add("hold", "stay at the size of this moment, whatever the host asks", waiting)
    add("deflate", "give everything back to the guest, whatever the host asks", waiting)
    add("stats", "what was moved by which queue, how long it took, and what the guest's kernel counts")
    watch = add("watch", "show the balloon, and go on showing it as it changes; Ctrl-C ends it")
    watch.add_argument("--count", type=int, metavar="N", help="end after so many changes")
    picture = add("map", "a picture of the guest's memory: free, used, and in the balloon by source")
    picture.add_argument("--cell", metavar="SIZE", help="what a character stands for (default: as fits the terminal)")
    completion = add("completion", "print what completes these commands in a shell: source <(balloonctl completion bash)")
    completion.add_argument("shell", choices=SHELLS)
    add("schema", "print the JSON Schema of the control socket's requests and answers")
    return top


def _size(arguments: argparse.Namespace, path: Path) -> int:
    """The size that the balloon is to have. BadInput if that makes no sense."""
    if arguments.guest is None and arguments.size[-1:] != "%" and arguments.size[:1] not in ("+", "-"):
        return parse_size(arguments.size)
    if arguments.guest is not None:
        kept = parse_size(arguments.guest)
    status = ask_status(path, {"op": "status"}, ANSWER_DEADLINE)
    if arguments.guest is None:
        return parse_wish(arguments.size, status["target_bytes"], status["ram_bytes"])
    machine = int(status["machine_bytes"])
    if kept > machine:
        raise BadInput(f"{arguments.guest!r} is more than the {format_size(machine)} that the machine has")
    return machine - kept


def _status(arguments: argparse.Namespace, path: Path) -> int:
    answer = ask(path, {"op": "status", "show": "json" if arguments.json else "words"}, ANSWER_DEADLINE)
    print(answer["text"])
    return REACHED


def _change(arguments: argparse.Namespace, path: Path) -> int:
    # Before anything is changed: a command is carried out whole or not at all.
    if not 0 <= arguments.timeout <= LONGEST_WAIT:
        raise BadInput(f"--timeout {arguments.timeout:g} is not from 0 to {LONGEST_WAIT:g} seconds")
    request: dict[str, Any] = {"op": arguments.command}
    if arguments.command == "set":
        request["size"] = _size(arguments, path)
    elif arguments.command == "deflate":
        request = {"op": "set", "size": 0}
    status = ask_status(path, request, ANSWER_DEADLINE)
    code = REACHED
    if not arguments.no_wait:
        status = _wait(arguments.timeout, path, status)
        # Limits, and need of memory, make the agent aim at something else.
        asked = request.get("size", status["host_target_bytes" if arguments.command == "follow" else "target_bytes"])
        if status["actual_bytes"] != asked or status["state"] == State.FAILED:
            code = FELL_SHORT
            print(f"balloonctl: short by {format_size(abs(asked - status['actual_bytes']))}: {_why(status)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(status, indent=2))
    else:
        print(ask(path, {"op": "status", "show": "words"}, ANSWER_DEADLINE)["text"])
    return code


def _why(status: dict[str, Any]) -> str:
    """It did not come to what was asked for."""
    if status["shortfall"]:
        return str(status["shortfall"])
    if status["actual_bytes"] == status["target_bytes"]:
        return str(status["reason"])
    return f"still {status['state']}, see --timeout"


def _wait(timeout: float, path: Path, status: dict[str, Any]) -> dict[str, Any]:
    if sys.stderr.isatty() and not State(status["state"]).at_rest:
        from .watch import show_progress

        return show_progress(path, status, timeout)
    return ask_status(path, {"op": "wait", "timeout": timeout}, timeout + ANSWER_DEADLINE)


def _stats(arguments: argparse.Namespace, path: Path) -> int:
    status = ask_status(path, {"op": "status"}, ANSWER_DEADLINE)
    guest = ask(path, {"op": "stats"}, ANSWER_DEADLINE)["stats"]
    names = ("inflated_bytes_total", "deflated_bytes_total", "queues", "run_sizes", "phase_seconds_total", "reliefs_total")
    if arguments.json:
        print(json.dumps({**{name: status[name] for name in names}, "guest": guest}, indent=2))
        return REACHED
    from .stats import statistics

    print(statistics(status, guest))
    return REACHED


def _watch(arguments: argparse.Namespace, path: Path) -> int:
    from .watch import watch

    if arguments.count is not None and arguments.count < 1:
        raise BadInput(f"--count {arguments.count} is less than 1")
    watch(path, arguments.count, as_json=arguments.json)
    return REACHED


def _map(arguments: argparse.Namespace, path: Path) -> int:
    from .map import show_map

    show_map(path, None if arguments.cell is None else parse_size(arguments.cell), as_json=arguments.json)
    return REACHED


def _completion(arguments: argparse.Namespace, _: Path) -> int:
    from shtab import complete

    print(complete(parser(), arguments.shell))
    return REACHED


def _schema(_: argparse.Namespace, __: Path) -> int:
    from balloon_agent.api.messages import schema

    print(json.dumps(schema(), indent=2))
    return REACHED


COMMANDS: dict[str, Callable[[argparse.Namespace, Path], int]] = {
    "status": _status,
    "set": _change,
    "follow": _change,
    "hold": _change,
    "deflate": _change,
    "stats": _stats,
    "watch": _watch,
    "map": _map,
    "completion": _completion,
    "schema": _schema,
}


def main(argv: Sequence[str]) -> int:
    """As ``balloonctl.main``."""
    # argparse takes a word for an option if it begins with a minus, unless there is a space in it.
    arguments = parser().parse_args([f" {word}" if _LESS.match(word) else word for word in argv])
    if getattr(arguments, "size", None) is not None:
        arguments.size = arguments.size.strip()
    try:
        return COMMANDS[arguments.command](arguments, arguments.run_dir / SOCKET_NAME)
    except AgentUnreachable as error:
        print(f"balloonctl: error: {error}", file=sys.stderr)
        return NO_AGENT
    except BalloonError as error:
        print(f"balloonctl: error: {error}", file=sys.stderr)
        return REFUSED
