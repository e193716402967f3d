"""contrib/bench: the benchmarks' command line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from contrib.vm.cache import MissingPart
from contrib.vm.experiment import PUNCHED
from contrib.vm.machine import GuestError

from . import breathing, fragmented, ledger
from . import idle as rest
from . import pressure as need

PARTS = ("breathing", "fragmented", "ledger")
KERNELS = {"default": (), "init_on_alloc=0": ("init_on_alloc=0",)}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it, as it goes into the file."""
    begin = time.monotonic()
    arguments.part = arguments.part or list(PARTS)
    arguments.sources = arguments.sources or list(breathing.SOURCES)
    arguments.kernel = arguments.kernel or list(KERNELS)
    result: dict[str, Any] = {}

    def say_for(*what: str) -> breathing.Say:
        return lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {' '.join(what)}: {text}", file=sys.stderr, flush=True)

    if "breathing" in arguments.part:
        result["breathing"] = {}
        for kernel in arguments.kernel:
            append = KERNELS[kernel]
            with breathing.boot(append) as machine:
                result["breathing"][kernel] = {
                    sources: {
                        state: figures.as_dict()
                        for state, figures in breathing.measure(
                            sources, say_for(kernel, sources), machine, cycles=arguments.cycles, append=append
                        ).items()
                    }
                    for sources in arguments.sources
                }
    if "ledger" in arguments.part:
        result["ledger"] = ledger.measure()
    if "fragmented" in arguments.part:
        result["fragmented"] = {
            memory: fragmented.measure(arguments.runs, say_for, memory=memory) for memory in arguments.memory or PUNCHED
        }
    return result


def pressure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it, as it goes into the file."""
    begin = time.monotonic()

    def say_for(kind: str) -> breathing.Say:
        return lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {kind}: {text}", file=sys.stderr, flush=True)

    runs = {kind: need.measure(kind, arguments.runs, say_for(kind)) for kind in arguments.kind or need.KINDS}
    return {"summary": need.summary(runs), "runs": runs}


def idle(_: argparse.Namespace) -> dict[str, Any]:
    """All of it, as it goes into the file."""
    begin = time.monotonic()
    return rest.measure(lambda text: print(f"[{time.monotonic() - begin:5.0f} s] {text}", file=sys.stderr, flush=True))


def parser() -> argparse.ArgumentParser:
    """The command line, also for its help text."""
    top = argparse.ArgumentParser(prog="contrib/bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    part = commands.add_parser("memory", help="how fast memory goes to the host and comes back, and what the host gains by it")
    part.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    part.add_argument("--part", choices=PARTS, action="append", help="only this one (default: all)")
    part.add_argument("--kernel", choices=KERNELS, action="append", help="only this kernel command line (default: both)")
    part.add_argument("--cycles", type=int, default=5, help="down and up so often in each state (default: %(default)s)")
    part.add_argument("--sources", choices=breathing.SOURCES, action="append", help="only with these (default: each)")
    part.add_argument("--memory", choices=tuple(PUNCHED), action="append", help="of the fragmented guest: only this")
    part.add_argument("--runs", type=int, default=1, help="of the fragmented guest with each driver (default: %(default)s)")
    part.set_defaults(measure=memory)
    part = commands.add_parser("pressure", help="who gets memory, how soon, and who is killed, in a guest with a large balloon")
    part.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    part.add_argument("--kind", choices=need.KINDS, action="append", help="only with this (default: each)")
    part.add_argument("--runs", type=int, default=5, help="programs that need memory, with each (default: %(default)s)")
    part.set_defaults(measure=pressure)
    part = commands.add_parser(
        "idle", help="what an agent with nothing to do costs, and how long it takes to ask it how it is, moving or not"
    )
    part.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    part.set_defaults(measure=idle)
    return top


def main() -> int:
    """Exit codes: 0 all went through, 1 something did not (said on stderr)."""
    arguments = parser().parse_args()
    try:
        result = arguments.measure(arguments)
    except (GuestError, MissingPart) as error:
        print(f"contrib/bench: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
