"""What moves on a terminal: the progress of a change, and the balloon as it breathes. Nothing is polled."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from balloon_agent.api.client import ask_status
from balloon_agent.api.snapshot import State
from balloon_agent.size import format_size

# Seconds that one request waits for a change; then it is asked again, for an agent that is gone to be noticed.
PATIENCE = 5.0
ANSWER_DEADLINE = 35.0
# Seconds between two pictures at least: a balloon that moves changes faster than anybody reads.
SHORTEST = 0.1


def changes(path: Path, status: dict[str, Any], deadline: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Each snapshot after ``status``, until ``deadline`` (as time.monotonic counts); some are left out while many come."""
    while (left := deadline - time.monotonic()) > 0:
        request = {"op": "next", "after": status["number"], "timeout": min(PATIENCE, left)}
        begin = time.monotonic()
        latest = ask_status(path, request, PATIENCE + ANSWER_DEADLINE)
        if latest["number"] == status["number"] and latest["pid"] == status["pid"]:
            continue
        status = latest
        yield status
        if not State(status["state"]).at_rest:
            time.sleep(max(0.0, min(SHORTEST - (time.monotonic() - begin), deadline - time.monotonic())))


@contextmanager
def _cursor_back(console: Console) -> Iterator[None]:
    """Also where a picture is interrupted before it has begun."""
    try:
        yield
    finally:
        console.show_cursor(True)


def show_progress(path: Path, status: dict[str, Any], timeout: float) -> dict[str, Any]:
    """A bar on stderr until the balloon has come to rest, or ``timeout`` seconds are over. Returns the status then."""
    begin, deadline = status["actual_bytes"], time.monotonic() + timeout
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[size]}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with _cursor_back(console), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(status["state"], total=1.0, size="")

        def show(now: dict[str, Any]) -> None:
            way = now["target_bytes"] - begin
            done = 1.0 if way == 0 else (now["actual_bytes"] - begin) / way
            size = f"{format_size(now['actual_bytes'])} of {format_size(now['target_bytes'])}"
            progress.update(task, description=now["state"], completed=max(0.0, min(1.0, done)), size=size)

        show(status)
        for status in changes(path, status, deadline):  # noqa: B020 - the latest one is what counts
            show(status)
            if State(status["state"]).at_rest:
                break
    return status


def watch(path: Path, count: int | None, *, as_json: bool) -> None:
    """Show the balloon, and each change; ``count`` changes if that is said. A line for each where there is no terminal."""
    status = ask_status(path, {"op": "status"}, ANSWER_DEADLINE)
    console = Console()
    shown = 0
    if as_json or not console.is_terminal or console.is_dumb_terminal:
        _print(status, as_json)
        for status in changes(path, status):  # noqa: B020
            if count is not None and shown >= count:
                return
            _print(status, as_json)
            shown += 1
            if count is not None and shown >= count:
                return
        return
    with _cursor_back(console), Live(picture(status), console=console, auto_refresh=False, screen=False) as live:
        for status in changes(path, status):  # noqa: B020
            live.update(picture(status), refresh=True)
            shown += 1
            if count is not None and shown >= count:
                return


def _print(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        text = json.dumps(status)
    else:
        text = (
            f"{status['state']:10} {format_size(status['actual_bytes'])} of {format_size(status['target_bytes'])}"
            f" ({status['reason']})" + (f": {status['shortfall']}" if status["shortfall"] else "")
        )
    print(text)
    sys.stdout.flush()


def picture(status: dict[str, Any]) -> Group:
    """The balloon as a bar of the guest's memory, and what it is made of."""
    ram = max(1, status["ram_bytes"])
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "balloon", ProgressBar(total=ram, completed=status["actual_bytes"], width=40), format_size(status["actual_bytes"])
    )
    target = f"{format_size(status['target_bytes'])} ({status['reason']})"
    table.add_row("target", ProgressBar(total=ram, completed=status["target_bytes"], width=40), target)
    for source, size in status["held_bytes"].items():
        table.add_row(f"  {source}", ProgressBar(total=ram, completed=size, width=40), format_size(size))
    moved = f"{format_size(status['inflated_bytes_total'])} up, {format_size(status['deflated_bytes_total'])} down"
    lines = [f"{status['state']}, mode {status['mode']}; moved {moved}; {status['reliefs_total']} reliefs"]
    if status["shortfall"]:
        lines.append(f"short: {status['shortfall']}")
    return Group(table, Text("\n".join(lines)))
