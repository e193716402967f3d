"""A process's place in the OOM killer's choice: oom_score_adj."""

from __future__ import annotations

# oom_score_adj: whom the OOM killer never takes, and whom it takes before anybody else.
PROTECTED, FIRST_CHOICE = -1000, 1000


def protect(adjustment: int) -> bool:
    """Tell the OOM killer how much it should like this process; whether that was permitted (it needs CAP_SYS_RESOURCE).

    Source: Documentation/filesystems/proc.rst, oom_score_adj.
    """
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(f"{adjustment}\n")
    except PermissionError:
        return False
    return True
