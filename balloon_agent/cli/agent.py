"""balloon-agent: the daemon's command line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from balloon_agent import __version__
from balloon_agent.agent.logs import to_stderr
from balloon_agent.agent.stopping import STOPPING, Stopping
from balloon_agent.errors import BadInput, BalloonError, Unsupported
from balloon_agent.linux import private
from balloon_agent.options import (
    OPTIONS,
    Option,
    Options,
    gather,
)

_log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line, also for its help text, man page and completion."""
    top = argparse.ArgumentParser(prog="balloon-agent", description="A virtio memory balloon, driven from userspace.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="take the device from the kernel and follow the host's target until stopped",
        epilog='Each of these but --config and --check-config is a key of the configuration file, too: reserve = "64M".',
    )
    run.add_argument("--config", type=Path, metavar="FILE", help="read options from this TOML file, and again at SIGHUP")
    run.add_argument("--check-config", action="store_true", help="say whether the options make sense, and change nothing")
    for option in OPTIONS:
        _add(run, option)
    undo = commands.add_parser("restore", help="undo what an agent that was killed has left changed, without going on with it")
    for option in OPTIONS:
        if option.name in ("run-dir", "verbose"):
            _add(undo, option)
    listing = commands.add_parser(
        "devices", help="list the balloons of this machine, who has them, and how they can be reached"
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    hand = commands.add_parser("bind", help="take a balloon from the kernel, and leave it to an agent that is started later")
    back = commands.add_parser("unbind", help="give a balloon back to the kernel's own driver")
    for each, names in ((listing, ()), (hand, ("driver", "vfio-noiommu")), (back, ("run-dir",))):
        for option in OPTIONS:
            if option.name in ("verbose", *(("device",) if each is not listing else ()), *names):
                _add(each, option)
    doctor = commands.add_parser(
        "doctor",
        help="say what is in an agent's way in this guest, and what to do about it; changes nothing",
        epilog="Exit codes: 0 if nothing fails (what is merely worse than it could be is a warning), 1 otherwise.",
    )
    doctor.add_argument("--json", action="store_true", help="print a list of {check, level, found, remedy}")
    doctor.add_argument("--config", type=Path, metavar="FILE", help="look at what an agent with this file would need")
    for option in OPTIONS:
        if option.name in ("device", "run-dir"):
            _add(doctor, option)
    completion = commands.add_parser("completion", help="print what completes these commands in a shell")
    completion.add_argument("shell", choices=("bash", "zsh"))
    return top


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.read is None:
        state = "on" if option.default else "off"
        parser.add_argument(
            f"--{option.name}",
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=f"{text} (default: {state})",
        )
        return
    if option.choices:
        text += f": {', '.join(str(choice) for choice in option.choices)}"
    if option.default not in (None, 0):
        default = ",".join(option.default) if isinstance(option.default, tuple) else f"{option.default}"
        text += f" (default: {default})"
    parser.add_argument(f"--{option.name}", metavar=option.metavar, default=argparse.SUPPRESS, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done or stopped by a signal, 1 an error (one line on stderr; doctor: something fails), 2 bad usage.

    3 where the agent cannot run at all: to start it again is of no use.
    """
    arguments = vars(parser().parse_args(argv))
    if arguments["command"] == "completion":
        from shtab import complete

        print(complete(parser(), arguments["shell"]))
        return 0
    command, file = arguments.pop("command"), arguments.pop("config", None)
    if command == "doctor":
        return _doctor(arguments, file, as_json=arguments.pop("json"))
    check, as_json = arguments.pop("check_config", False), arguments.pop("json", False)
    logging.basicConfig(level=logging.INFO, format="balloon-agent: %(message)s", handlers=[to_stderr()])
    # An agent goes on as far as it takes to give back what an earlier one left. Other commands stop as after any error, with
    # everything put back, and undisturbed.
    stopping = Stopping() if command == "run" else None
    for number in STOPPING if stopping is None else ():
        signal.signal(number, _stop)
    try:
        options = gather(arguments, file)
        logging.getLogger().setLevel(logging.DEBUG if options.verbose else logging.INFO)
        if check:
            _check(options)
            print(f"{file or 'the command line'} makes sense")
            return 0
        # Imported late: --help and a wrong command line need none of it.
        if command == "restore":
            from balloon_agent.takeover.restore import restore

            restore(options.run_dir)
            return 0
        if command in ("devices", "bind", "unbind"):
            from balloon_agent.takeover import by_hand

            if command == "devices":
                print(by_hand.devices(as_json=as_json))
            else:
                print((by_hand.bind if command == "bind" else by_hand.unbind)(options))
            return 0
        from balloon_agent.agent.run import run

        assert stopping is not None
        run(options, None if file is None else lambda: gather(arguments, file), stopping)
    except Unsupported as error:
        return _failed(str(error), code=3)
    except (BalloonError, OSError) as error:
        return _failed(str(error))
    except Exception as error:
        return _failed(f"a defect of this program: {type(error).__name__}: {error}; --verbose shows where")
    return 0


def _check(options: Options) -> None:
    """What can be tried without changing anything. BadInput for what would not do."""
    if (obstacle := private.obstacle(options.run_dir)) is not None:
        raise BadInput(f"--run-dir {options.run_dir}: {obstacle}; choose one of root's alone, such as {Options().run_dir}")
    if options.metrics_certificate is None:
        return
    from balloon_agent.api.tls import security

    if (papers := security(options)) is not None:
        papers.context()


def _doctor(flags: dict[str, object], file: Path | None, *, as_json: bool) -> int:
    from balloon_agent.doctor import doctor
    from balloon_agent.doctor.machine import Machine

    options, problem = Options(), None
    try:
        options = gather(flags, file)
        _check(options)
    except (BalloonError, OSError) as error:
        problem = str(error)
    findings = doctor.examine(Machine(options, problem=problem, file=file))
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    try:
        print(doctor.as_json(findings) if as_json else doctor.as_text(findings, coloured=coloured), flush=True)
    except BrokenPipeError:
        # Whoever read it has had enough; nothing more is to be written when this process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return doctor.exit_code(findings)


def _stop(*_: object) -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _failed(text: str, code: int = 1) -> int:
    _log.error("error: %s", text.replace("\n", " "))
    _log.debug("where it happened", exc_info=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
