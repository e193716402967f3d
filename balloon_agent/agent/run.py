"""Putting an agent together on this machine, and taking it apart again, in the order that keeps the guest safe.

Up: locks, state, binding, registers, and with that a device that was reset; how all of it is released; only then what an
earlier agent has left, and the device is started. The daemon tells it of what is held.
Down: the device is reset, what is still held goes back to the guest or stays held, pins go, and the device is given back if
nothing is held. A start that fails leaves everything held for the next one, or for `restore`; one that is stopped by a signal
does as an agent that is stopped. (The daemon has emptied the balloon before that, if it ended in peace.)
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from balloon_agent import __version__
from balloon_agent.access import descriptors
from balloon_agent.access.plugging import PciPlugging
from balloon_agent.api.control import Access, ControlServer
from balloon_agent.api.endpoint import Endpoint
from balloon_agent.api.snapshot import Snapshot
from balloon_agent.api.tls import security
from balloon_agent.errors import BalloonError, DeviceNotFound, NotPermitted
from balloon_agent.frames import FRAME
from balloon_agent.guest.headroom import PLENTY, Spare
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.guest.supported import check_supported
from balloon_agent.guest.sysctls import Settings, oom_killer_chooses
from balloon_agent.linux import libc, memory_blocks
from balloon_agent.linux.installed_memory import machine_bytes, physical_bytes
from balloon_agent.linux.niceness import AHEAD, give_priority
from balloon_agent.linux.oom_score import PROTECTED, protect
from balloon_agent.linux.pin import obstacle_to_pinning
from balloon_agent.linux.zones import node_starts
from balloon_agent.memory.hidden import Hidden
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.memory.sources.block_watch import BlockWatch
from balloon_agent.memory.sources.blocks import BlockSource
from balloon_agent.memory.sources.held import HeldSource
from balloon_agent.memory.worker import Worker
from balloon_agent.options import (
    CHANGE,
    KEEP,
    Options,
)
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon
from balloon_agent.sizing.governor import Mode
from balloon_agent.sizing.pressure import Need
from balloon_agent.sizing.relief import Relief
from balloon_agent.takeover.device_slot import Seat
from balloon_agent.takeover.held import HOLDERS, what_is_held
from balloon_agent.takeover.lock import lock_run_dir
from balloon_agent.takeover.release import Succession, release, silence
from balloon_agent.takeover.restore import put_back_all, undo
from balloon_agent.takeover.state import StateFile

from .adoption import adopt
from .daemon import Daemon
from .host_target import HostTarget
from .policy import Policy, policy_of, reserve_of
from .policy import reload as apply
from .recovery import Recovery
from .stock import holder_capacity, sources_of
from .stopping import Stopping
from .surroundings import ram_of, signs_of_need
from .systemd import Notifier

# Where the kernel has no memory blocks, runs are still cut as if it had: hosts may look a run up by such pieces.
DEFAULT_BOUNDARY = (128 << 20) // FRAME
UNPINNED = (
    "memory is NOT PINNED (--allow-unpinned): the kernel may move it, and the host would then discard somebody else's; "
    "for experiments only"
)
_log = logging.getLogger(__name__)


@dataclass
class _Ending:
    """How it ends: whether what is held stays so, for the next agent. It does if the start fails, whatever that was."""

    keeps: bool = True


def run(options: Options, gather: Callable[[], Options] | None = None, stopping: Stopping | None = None) -> None:
    """Run an agent until a signal stops it. ``gather`` reads the options anew, BadInput if they make no sense.

    One that comes before the daemon listens is noted by ``stopping``. The agent goes on as far as it takes to give back what an
    earlier one has left, or to keep it, as ``on_stop`` says.
    """
    if os.geteuid() != 0:
        raise NotPermitted(
            f"the agent must run as root, not as user {os.geteuid()}: it binds a device and pins memory (try sudo)"
        )
    check_supported()
    descriptors.set_limit()
    obstacle = obstacle_to_pinning()
    if obstacle is not None and not options.allow_unpinned and BlockSource.name not in options.sources:
        raise NotPermitted(obstacle.found, f"{obstacle.remedy}; or add `blocks` to --sources, which needs no pin")
    libc.bound_heap()
    with ExitStack() as stack:
        _run(options, gather, stopping or Stopping(), None if obstacle is None else str(obstacle), stack)


def _run(
    options: Options,
    gather: Callable[[], Options] | None,
    stopping: Stopping,
    obstacle: str | None,
    stack: ExitStack,
) -> None:
    notifier = Notifier()
    ending, keeps = _Ending(), options.on_stop == KEEP
    ledger = Ledger()
    stack.callback(lock_run_dir(options.run_dir).close)
    state = StateFile(options.run_dir / "state.json")
    seat = Seat(options, state, partial(what_is_held, state, options.run_dir), alive=notifier.beat)
    stack.callback(seat.close)
    seat.forget_absent()
    try:
        device = seat.take()
    except DeviceNotFound as error:
        _give_back_what_is_held(partial(put_back_all, options.run_dir, state), error)
        raise

    ram = ram_of(state)
    reserve = reserve_of(options, ram)
    page_size = os.sysconf("SC_PAGE_SIZE")

    relief = Relief(reserve, options.relief_cooldown, shrinks=options.relief)
    spare = Spare(reserve + PLENTY, page_size)
    need: Need | None = None
    holders = Holders(options.run_dir / HOLDERS, lambda: math.inf if need is None else need.leeway(), notifier.beat)
    if state.is_foreign:
        _log.warning("a newer version has written the state file: what it has taken is not gone on with, but given back")
        for problem in undo(state, holders):
            _log.error("%s", problem)
    balloon: Balloon | None = None

    def is_empty(holder: str) -> bool:
        return not (balloon.keeps(holder) if balloon is not None else ledger.of_holder(holder))

    stack.callback(holders.close, is_empty)
    worker = Worker(holders)
    sources = sources_of(
        holders,
        worker,
        ledger,
        seat,
        state,
        lambda: spare() - relief.reserve,
        obstacle,
        options,
    )
    # From before the first block is looked at: what is heard of those is looked at again.
    watch = BlockWatch(next(source for source in sources if isinstance(source, BlockSource)))
    stack.callback(watch.close)
    unpinned = obstacle is not None and options.allow_unpinned
    boundary = (memory_blocks.block_size() or DEFAULT_BOUNDARY * FRAME) // FRAME
    cuts = node_starts(Path("/proc/zoneinfo").read_text(), page_size)
    settings = Settings(
        ledger,
        ram,
        lambda: relief.reserve,
        state.record_sysctl,
        state.sysctls,
        state.shared_settings(),
        warns_early=options.relief,
        overcommits=options.overcommit,
        page_kib=page_size >> 10,
    )
    stack.callback(settings.follow)
    # Holders' huge pages have no holes, and are most of what there is to look through.
    hidden = Hidden(worker, lambda: [holder.pid for holder in holders])
    balloon = Balloon(
        device,
        sources,
        options.sources,
        ledger,
        spare,
        reserve,
        boundary,
        cuts=cuts,
        hidden=hidden,
        caches=lambda: spare.caches,
        changed=settings.follow,
    )
    stack.callback(release, sources, balloon, device, lambda: ending.keeps)
    # What was registered before is undone after this: no memory goes back to the guest behind the host's back while the
    # device could still act on what was posted.
    stack.callback(lambda: silence(device, seat.transport))

    found = holders.adopt(waking=stopping.fileno())
    # The device has been reset: nobody acts on what they hold.
    stuck = [] if stopping.is_asked and keeps else holders.end_unclaimed()
    for problem in stuck:
        _log.error("%s", problem)
    if stuck:
        balloon.notes[HOLDERS] = "; ".join(stuck)
    adopt(sources, found, holders, ledger, state, allow_unpinned=unpinned)
    if stopping.is_asked:
        ending.keeps = keeps
        return

    def started() -> None:
        device.oom_killer_chooses = oom_killer_chooses()
        capacity = holder_capacity(ram, bears_loss=device.bears_loss)
        for source in sources:
            if isinstance(source, HeldSource):
                source.holder_capacity = capacity
        seat.verify()

    device.start()
    started()
    holders.warm_up()
    settings.follow()
    plugging = PciPlugging()
    stack.callback(plugging.close)
    succession = Succession(seat, sources, balloon, settings.follow, plugging, notifier.alive)
    recovery = Recovery(device, balloon, successor=succession, started=started)
    recovery.announce()
    demand, stalls = signs_of_need(stack) if options.relief else (None, None)

    def reload() -> Policy:
        assert gather is not None
        policy = apply(options, gather(), ram, relief, balloon, endpoint)
        spare.plenty = relief.reserve + PLENTY
        settings.follow()
        # Heard by holders when the balloon rests, which is next.
        device.oom_killer_chooses = oom_killer_chooses()
        return policy

    first = Snapshot(
        version=__version__,
        pid=os.getpid(),
        device=seat.address,
        driver=seat.driver,
        channel=device.channel_name,
        offered_features=int(device.offered),
        negotiated_features=device.virtio.negotiated,
        reserve_bytes=reserve,
        ram_bytes=ram,
        unpinned=unpinned,
        obstacle=obstacle,
    )
    if obstacle is not None:
        _log.warning("%s", UNPINNED if unpinned else f"{obstacle}; until then only whole blocks are taken")
    need = Need(
        relief,
        spare,
        demand,
        None if stalls is None else stalls.fd,
        samples=options.relief and demand is None,
        is_deaf=lambda: options.relief and spare.hopeless,
        free_hidden=partial(hidden.free, at_need=True),
    )
    daemon = Daemon(
        device,
        seat,
        balloon,
        holders,
        recovery,
        GuestStatistics(),
        ram,
        HostTarget(ram, physical_bytes, machine_bytes),
        first,
        need=need,
        policy=policy_of(options),
        wish=state.wish or (Mode.FOLLOW, 0),
        remember=state.record_wish,
        reload=None if gather is None else reload,
        notifier=notifier,
        plugging=plugging,
        blocks=watch,
        is_stopped=lambda: stopping.is_asked,
    )
    guest = GuestStatistics()
    access = Access(options.control_group, may_change=options.control_group_may == CHANGE)
    control = ControlServer(options.run_dir, daemon.board, daemon.inbox, guest.by_name, access)
    stack.callback(control.stop)
    # Before there are other threads, for them to have it too: one that waits for its turn on the processor may have Python's
    # lock meanwhile, which this thread then waits for.
    if not give_priority(AHEAD):
        _log.warning("in a busy guest this process has to wait for its turn: running ahead of others needs CAP_SYS_NICE")
    endpoint = Endpoint(daemon.board, options.metrics_listen, security(options), guest)
    stack.callback(endpoint.stop)
    if not protect(PROTECTED):
        _log.warning("the OOM killer may choose this process: protecting it needs CAP_SYS_RESOURCE")
    libc.lock_all_memory()
    worker.warm_up()
    control.start()
    _log.info(
        "driving %s through %s by its %s queues; metrics on %s; reserve %s",
        seat.address,
        seat.driver,
        device.channel_name,
        endpoint.url,
        format_size(reserve),
    )
    ending.keeps = keeps
    ending.keeps = daemon.run()


def _give_back_what_is_held(put_back: Callable[[], bool], error: DeviceNotFound) -> None:
    """Memory that an earlier agent has left held goes back: no host has it without a device, and nobody relieves the guest."""
    try:
        was_held = put_back()
    except (BalloonError, OSError) as problem:
        raise DeviceNotFound(f"{error}; of what an earlier agent has held not all goes back: {problem}") from error
    if was_held:
        raise DeviceNotFound(f"{error}; what an earlier agent has held is the guest's again") from error
