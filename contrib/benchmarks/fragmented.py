"""The proposal's fragmented guest, where every large piece must first be made by moving pages, over and over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from contrib.vm import experiment

from .breathing import Say

# How each driver is started: options of the agent, or None for the kernel's own.
DRIVERS: dict[str, Sequence[str] | None] = {
    "kernel": None,
    "default": (),
    "thp": ("--sources", "thp,pages"),
    "reporting": ("--channel", "reporting"),
    "classic": ("--channel", "classic"),
}


def measure(
    runs: int, say_for: Callable[..., Say], drivers: Sequence[str] = tuple(DRIVERS), memory: str = experiment.HUGE_PAGES
) -> dict[str, Any]:
    """``runs`` with each driver, in turn, and their times as multiples of the kernel's in the same round.

    ``memory`` is the kind of pages that the guest's lies in: see ``experiment.PUNCHED``.
    """
    results: dict[str, list[dict[str, Any]]] = {driver: [] for driver in drivers}
    for number in range(runs):
        for driver in drivers:
            options = DRIVERS[driver]
            kind = "kernel" if options is None else "agent"
            device = experiment.REPORTING_DEVICE if driver == "reporting" else experiment.BALLOON_DEVICE
            result = experiment.run(kind, say_for(f"run {number + 1}", driver), memory, device, options=options or ())
            results[driver].append(result.as_dict())
    return {
        **results,
        "ratios": {driver: ratios(results["kernel"], results[driver]) for driver in drivers if driver != "kernel"},
    }


def ratios(kernel: Sequence[dict[str, Any]], agent: Sequence[dict[str, Any]]) -> list[float]:
    """Time to 600 MiB, each round by itself."""
    return [float(ours["inflate_seconds"] / theirs["inflate_seconds"]) for ours, theirs in zip(agent, kernel, strict=True)]
