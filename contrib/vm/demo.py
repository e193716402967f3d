"""The demo: the experiment for the guest kernel's driver and for the agent, side by side with what was published."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import experiment
from .cache import MissingPart
from .experiment import HUGE_PAGES, PUBLISHED, PUNCHED, SMALL_PAGES, STEPS, Result
from .machine import GuestError

DRIVERS = ("kernel", "agent")
TITLES = {"kernel": "kernel driver, 4 KiB", "agent": "balloon-agent"}
STEP_TITLES = {
    "touched": "guest has touched and punched",
    "inflated": "balloon at 600 MiB",
    "reused": "balloon back at 1024 MiB, memory reused",
}
MEMORY_TITLES = {
    HUGE_PAGES: "to the letter: the guest's memory is in huge pages, and what is freed in them hides",
    SMALL_PAGES: "the guest's memory is in small pages, and what is freed is free",
}
# What else counts, and how it is printed.
FIGURES: dict[str, Callable[[Result], str]] = {
    "guest's MemFree after punching, MiB": lambda result: f"{result.guest_free_mib:.0f}",
    "seconds to 600 MiB": lambda result: f"{result.inflate_seconds:.2f}",
    "seconds back to 1024 MiB": lambda result: f"{result.deflate_seconds:.2f}",
    "guest had, MiB": lambda result: " and ".join(f"{size:g}" for size in result.actual_mib.values()),
    "lost THP, kB": lambda result: str(result.lost_thp_kib),
    "host MemFree gained, kB": lambda result: str(result.host_free_gained_kib),
}


def table(results: dict[str, Result]) -> str:
    """The proposal's table, host AnonHugePages in kB, and what else counts, as text."""
    columns = {TITLES[driver]: result.anon_huge_kib for driver, result in results.items()} | PUBLISHED
    rows = [["host AnonHugePages, kB", *columns]]
    rows += [[STEP_TITLES[step], *(str(column[step]) for column in columns.values())] for step in STEPS]
    dashes = ["-"] * len(PUBLISHED)
    for title, cell in FIGURES.items():
        rows.append([title, *(cell(result) for result in results.values()), *dashes])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main() -> int:
    """Exit codes: 0 all went through, 1 something did not (said on stderr)."""
    parser = argparse.ArgumentParser(prog="contrib/demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, for each driver")
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="only this one (default: both)")
    parser.add_argument("--memory", choices=tuple(PUNCHED), action="append", help="of the guest: only this (default: both)")
    arguments = parser.parse_args()
    begin = time.monotonic()
    results: dict[str, dict[str, Result]] = {}
    for memory in arguments.memory or PUNCHED:
        results[memory] = {}
        for driver in arguments.driver or DRIVERS:

            def say(text: str, driver: str = driver) -> None:
                print(f"[{time.monotonic() - begin:5.0f} s] {driver}: {text}", file=sys.stderr, flush=True)

            try:
                results[memory][driver] = experiment.run(driver, say, memory)
            except (GuestError, MissingPart) as error:
                print(f"contrib/demo: {driver}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
                return 1
    for memory, of_drivers in results.items():
        print(f"{MEMORY_TITLES[memory]}\n\n{table(of_drivers)}\n")
    print(
        "lost THP: memory that lay in huge pages of the host, is not in the balloon, and lies in huge pages no longer.\n"
        "published: by the proposal's author, on another host; the columns before it were measured here, just now."
    )
    if arguments.json:
        figures = {memory: {driver: result.as_dict() for driver, result in each.items()} for memory, each in results.items()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
