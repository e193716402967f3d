"""The ways in which devices number their queues: for the model to be any of them."""

from __future__ import annotations

MUST_TELL_HOST, STATS, DEFLATE_ON_OOM, HINT, POISON, REPORTING, CONT = (1 << bit for bit in range(7))
ROLES = ("inflate", "deflate", "stats", "free_page", "reporting", "inflate_cont", "deflate_cont")
FEATURE_OF = {"stats": STATS, "free_page": HINT, "reporting": REPORTING, "inflate_cont": CONT, "deflate_cont": CONT}


def offered(features: int) -> list[str]:
    """The queues that a device with these features offers, in the specification's order."""
    return [role for role in ROLES if role not in FEATURE_OF or features & FEATURE_OF[role]]


def qemu(features: int, *, hint_withdrawn: bool = False) -> list[str | None]:
    """In the order of creation; statistics always."""
    there = {*offered(features), "stats", *(["free_page"] if hint_withdrawn else [])}
    return [role for role in ROLES if role in there]


def compact(features: int) -> list[str | None]:
    """In the same order, only what is offered: cloud-hypervisor, Firecracker, and what Linux expects."""
    return [*offered(features)]


def fixed(features: int) -> list[str | None]:
    """The specification's numbers, with holes."""
    there = offered(features)
    length = ROLES.index(there[-1]) + 1
    return [role if role in there else None for role in ROLES[:length]]


SCHEMES = {"qemu": qemu, "compact": compact, "fixed": fixed}
