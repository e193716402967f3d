"""Numbers in columns, for people."""

from __future__ import annotations

from typing import Any

from balloon_agent.size import format_size

# What the guest's kernel counts in bytes; all else are events.
_BYTES = ("memory", "swap", "caches", "scanned", "reclaimed")


def statistics(status: dict[str, Any], guest: dict[str, int]) -> str:
    """All that ``balloonctl stats`` shows."""
    rows: list[tuple[str, str, str]] = [
        (f"{direction}d", format_size(status[f"{direction}d_bytes_total"]), "") for direction in ("inflate", "deflate")
    ]
    for queue, counts in status["queues"].items():
        failed = f", {counts['failed_operations']} failed" if counts["failed_operations"] else ""
        rows.append((f"queue {queue}", format_size(counts["done_bytes"]), f"in {counts['done_operations']} operations{failed}"))
    for direction, runs in status["run_sizes"].items():
        number = sum(runs["counts"])
        if number:
            rows.append(
                (f"runs, {direction}", f"{number}", f"{format_size(runs['bytes'] // number // 4096 * 4096)} on average")
            )
    rows += [(f"time, {phase}", f"{seconds:.3f} s", "") for phase, seconds in status["phase_seconds_total"].items()]
    rows.append(("reliefs", str(status["reliefs_total"]), "times that the balloon shrank for want of memory"))
    for name, value in guest.items():
        text = format_size(value) if any(part in name for part in _BYTES) else str(value)
        rows.append((f"guest, {name.replace('_', ' ')}", text, ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {value:>{widths[1]}}  {rest}".rstrip() for name, value, rest in rows)
