"""Options that say how large the balloon may be, and their change while the agent runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from balloon_agent.api.endpoint import Endpoint
from balloon_agent.balloon.channels import AUTO
from balloon_agent.options import (
    ALWAYS,
    KEEP,
    NEVER,
    Options,
    fixed_changes,
)
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.governor import reserve_for
from balloon_agent.sizing.relief import Relief

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """Limits by the options, in bytes. ``below_target``: need counts below the target (None: if the host allows).

    ``keeps`` if the balloon is to outlive the agent.
    """

    lower: int = 0
    upper: int | None = None
    below_target: bool | None = None
    keeps: bool = False


NO_POLICY = Policy()


def reserve_of(options: Options, ram: int) -> int:
    return reserve_for(ram) if options.reserve is None else options.reserve


def policy_of(options: Options) -> Policy:
    below = {AUTO: None, ALWAYS: True, NEVER: False}[options.relief_below_target]
    return Policy(options.lower_limit, options.upper_limit, below, keeps=options.on_stop == KEEP)


def reload(before: Options, after: Options, ram: int, relief: Relief, balloon: Balloon, endpoint: Endpoint) -> Policy:
    """Apply options that can change while the agent runs, and name the others in the log. BadInput, and nothing is changed."""
    fixed = fixed_changes(before, after)
    if fixed:
        _log.warning("not changed before the next start: %s", ", ".join(fixed))
    endpoint.read_certificates()
    balloon.reserve = reserve_of(after, ram)
    relief.set(balloon.reserve, after.relief_cooldown)
    balloon.enable(after.sources)
    logging.getLogger().setLevel(logging.DEBUG if after.verbose else logging.INFO)
    _log.info("options are read anew: reserve %s, sources %s", format_size(balloon.reserve), ", ".join(after.sources))
    return policy_of(after)
