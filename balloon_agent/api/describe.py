"""A snapshot in words, for people. Done by the agent, so that whoever only prints it is quick."""

from __future__ import annotations

from balloon_agent.size import format_size

from .snapshot import Snapshot


def describe(now: Snapshot) -> str:
    """Several lines."""
    held = ", ".join(f"{source} {format_size(size)}" for source, size in now.held_bytes.items()) or "nothing"
    lines = [
        f"balloon  {format_size(now.actual_bytes)} of {format_size(now.target_bytes)} ({now.reason})",
        f"state    {now.state}, mode {now.mode}",
        f"held     {held}",
        f"host     asks for {format_size(now.host_target_bytes)}",
        f"device   {now.device} through {now.driver}, told of memory by its {now.channel} queues",
        f"agent    {now.version}, process {now.pid}",
    ]
    if now.unpinned:
        lines.append("UNPINNED what is held may be moved, and the host discards memory of others then: for experiments only")
    if now.shortfall:
        lines.append(f"short    {now.shortfall}")
    if any(now.hidden_freed_bytes_total.values()):
        freed = ", ".join(
            f"{format_size(size)} freed by {means}" for means, size in now.hidden_freed_bytes_total.items() if size
        )
        lines.append(f"hidden   {freed}")
    if now.reliefs_total:
        lines.append(f"relief   {now.reliefs_total} times, for want of memory")
    if any(now.device_faults_total.values()):
        faults = ", ".join(f"{kind} {count}" for kind, count in now.device_faults_total.items() if count)
        lines.append(f"faults   {faults}")
    lines += [f"note     {source}: {note}" for source, note in now.source_notes.items()]
    return "\n".join(lines)
