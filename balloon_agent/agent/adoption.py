"""Entering what an earlier agent has left in the balloon. The device has been reset, and is told of it later."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from balloon_agent.holder.allocate import NOT_PINNED
from balloon_agent.linux import memory_blocks
from balloon_agent.memory.holder_client import HolderClient
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.memory.sources.blocks import BlockSource
from balloon_agent.memory.sources.held import HeldSource
from balloon_agent.memory.sources.hugetlb import HugetlbSource
from balloon_agent.memory.sources.source import Source
from balloon_agent.size import format_size
from balloon_agent.takeover.state import StateFile

_log = logging.getLogger(__name__)


def adopt(
    sources: Sequence[Source],
    found: Sequence[HolderClient],
    holders: Holders,
    ledger: Ledger,
    state: StateFile,
    memory_root: str = memory_blocks.MEMORY_ROOT,
    *,
    allow_unpinned: bool = False,
) -> None:
    """Enter the blocks on record that are offline, and what the holders that were ``found`` describe.

    The workers of the earlier agent have ended, so that no block changes its state any more.
    """
    by_name = {source.name: source for source in sources}
    whole = by_name[BlockSource.name]
    assert isinstance(whole, BlockSource)
    _adopt_blocks(whole, ledger, state, memory_root)
    for holder in found:
        try:
            _adopt_extents(holder, by_name, ledger, allow_unpinned=allow_unpinned)
        except (KeyError, TypeError, ValueError) as error:
            _give_up(holder, error, by_name, holders, ledger)
    for source in sources:
        if isinstance(source, HugetlbSource):
            source.pool.reconcile(ledger.by_source().get(source.name, 0) // source.pool.size)
    if len(ledger):
        _log.info("an earlier agent left %s in the balloon", format_size(ledger.size))


def _adopt_blocks(whole: BlockSource, ledger: Ledger, state: StateFile, root: str) -> None:
    size = memory_blocks.block_size(root)
    if size is None:
        return
    for number, zone in list(state.blocks.items()):
        now = memory_blocks.state(root, number)
        if now in memory_blocks.BACK:
            state.forget_blocks([number])
            continue
        extent = whole.adopt_left(memory_blocks.Block(number, memory_blocks.block_run(number, size), zone))
        if extent is None:
            # A worker that could not be ended is at it: it stays on record, and counts as held.
            _log.error("memory%d is %s, and may change yet: it is left alone for now", number, now)
        else:
            ledger.add(extent)


def _adopt_extents(holder: HolderClient, by_name: dict[str, Source], ledger: Ledger, *, allow_unpinned: bool) -> None:
    while holder.extents:
        description = holder.extents[-1]
        source = by_name[description["source"]]
        if not isinstance(source, HeldSource):
            raise TypeError(f"{source.name} has no holders")
        extent = source.adopt(description, holder.name)
        if description["pin"] == NOT_PINNED and not allow_unpinned:
            # The device has been reset: the host hears nothing more of it.
            _log.warning("%s was never pinned: it goes back", extent.name)
            source.give_back([extent])
        else:
            ledger.add(extent)
        holder.extents.pop()


def _give_up(holder: HolderClient, error: Exception, by_name: dict[str, Source], holders: Holders, ledger: Ledger) -> None:
    """What makes no sense cannot be gone on with: the holder is ended, and all of it is the guest's."""
    _log.error("holder %s is ended, for what it holds makes no sense: %s", holder.name, error)
    extents = ledger.of_holder(holder.name)
    holders.kill(holder.name)
    for extent in extents:
        ledger.remove(extent.name)
        # Nobody is there to be asked; what this process knows of it goes.
        by_name[extent.source].give_back([extent])
