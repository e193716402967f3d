"""balloon-agent: the daemon's command line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from balloon_agent import __version__
from balloon_agent.errors import BalloonError
from balloon_agent.memory.sources import DEFAULT_SOURCES, SOURCE_NAMES
from balloon_agent.sizing.size import parse_size

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_log = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line, also for its help text."""
    top = argparse.ArgumentParser(prog="balloon-agent", description="A virtio memory balloon, driven from userspace.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="take the device from the kernel and follow the host's target until stopped")
    run.add_argument("--device", metavar="ADDRESS", help="PCI address of the balloon (default: the only one there is)")
    run.add_argument(
        "--run-dir", type=Path, default=Path("/run/balloon-agent"), help="sockets and state (default: %(default)s)"
    )
    run.add_argument(
        "--metrics-listen",
        metavar="HOST:PORT",
        default="127.0.0.1:9758",
        help="where to serve /metrics (default: %(default)s)",
    )
    run.add_argument(
        "--sources",
        metavar="LIST",
        default=",".join(DEFAULT_SOURCES),
        help=f"where to take memory from, the first first, of {', '.join(SOURCE_NAMES)} (default: %(default)s)",
    )
    run.add_argument(
        "--reserve",
        metavar="SIZE",
        help="memory above the kernel's own reserves that inflating leaves (default: 5 %% of RAM, or 64M if that is more)",
    )
    run.add_argument(
        "--channel",
        choices=("auto", "cont", "reporting", "classic"),
        default="auto",
        help="which of the device's queues carry memory (default: %(default)s, the best that the device offers)",
    )
    run.add_argument(
        "--frames-per-buffer",
        type=int,
        choices=(256, 512),
        default=256,
        help="on the classic queues; 512 for a host whose memory lies in 2 MiB pages (default: %(default)s)",
    )
    run.add_argument(
        "--allow-unpinned",
        action="store_true",
        help="where io_uring is forbidden, hold memory without a pin, at the guest's peril: for experiments",
    )
    run.add_argument(
        "--no-relief",
        action="store_true",
        help="do not shrink when the guest runs short: the OOM killer may have what is held, where the host allows it",
    )
    run.add_argument("--verbose", action="store_true", help="log more")
    undo = commands.add_parser("restore", help="undo what an agent that was killed has left changed, without going on with it")
    undo.add_argument(
        "--run-dir",
        type=Path,
        default=Path("/run/balloon-agent"),
        help="where it kept its state (default: %(default)s)",
    )
    undo.add_argument("--verbose", action="store_true", help="log more")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped by a signal, 1 an error (one line on stderr), 2 a wrong command line."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="balloon-agent: %(message)s",
        stream=sys.stderr,
    )
    # Until the daemon has handlers of its own: stop as after any error, with everything put back, and undisturbed.
    for number in STOPPING:
        signal.signal(number, _stop)
    try:
        # Imported late: --help and a wrong command line need none of it.
        if arguments.command == "restore":
            from balloon_agent.service.restore import restore

            restore(arguments.run_dir)
            return 0
        from balloon_agent.service.assembly import Options, run

        run(
            Options(
                device=arguments.device,
                run_dir=arguments.run_dir,
                metrics_listen=arguments.metrics_listen,
                sources=[name.strip() for name in arguments.sources.split(",") if name.strip()],
                reserve=None if arguments.reserve is None else parse_size(arguments.reserve),
                channel=arguments.channel,
                frames_per_buffer=arguments.frames_per_buffer,
                allow_unpinned=arguments.allow_unpinned,
                relief=not arguments.no_relief,
            )
        )
    except (BalloonError, OSError) as error:
        return _failed(str(error))
    except Exception as error:
        return _failed(f"a defect of this program: {type(error).__name__}: {error}; --verbose shows where")
    return 0


def _stop(*_: object) -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _failed(text: str) -> int:
    _log.error("error: %s", text.replace("\n", " "))
    _log.debug("where it happened", exc_info=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
