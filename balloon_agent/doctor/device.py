"""The device: is it there, what does it offer, who has it, and how could the agent reach it."""

from __future__ import annotations

from balloon_agent.access import host
from balloon_agent.access.binding import AUTO, KERNEL_DRIVER, obstacle
from balloon_agent.access.names import DRIVERS, UIO_DRIVER, VFIO_DRIVER
from balloon_agent.access.pci import PciFunction, find_balloon
from balloon_agent.balloon.wire import BalloonFeature
from balloon_agent.errors import DeviceNotFound, Obstacle
from balloon_agent.virtio.spec import TransportFeature

from .machine import (
    Finding,
    Machine,
    fail,
    ok,
    warn,
)

_BETTER = "on the host: -device virtio-balloon-pci,free-page-reporting=on (QEMU 5.1), or cont-pages=on (patched)"


def device(machine: Machine) -> Finding:
    try:
        function = find_balloon(machine.options.device, machine.functions)
    except DeviceNotFound as error:
        return fail(error.found, error.remedy or "choose one of those with --device ADDRESS")
    return ok(f"{function.address} is a virtio balloon")


def driver(machine: Machine) -> Finding | None:
    function = machine.balloon
    if function is None:
        return None
    if machine.drives is not None:
        return ok(f"{function.driver or 'no driver'}, for the agent that runs, process {machine.drives}")
    match function.driver:
        case None:
            return warn(
                f"{function.address} has no driver: nobody drives the balloon",
                "balloon-agent run takes it; balloon-agent unbind gives it to the kernel",
            )
        case known if known in DRIVERS:
            return warn(
                f"{function.address} is with {known}, and no agent runs: nobody drives the balloon",
                "start one (balloon-agent run), or balloon-agent restore if an agent has left it so, or balloon-agent unbind",
            )
        case known if known == KERNEL_DRIVER:
            owner = machine.virtio and machine.virtio / "driver"
            bound = owner.resolve().name if owner and owner.exists() else "no driver below that"
            return ok(f"{known}, with {bound}: the agent takes it from there, and gives it back at its end")
        case other:
            return fail(
                f"{function.address} is bound to {other}, which may be using it",
                f"unbind it first: echo {function.address} >{function.path}/driver/unbind",
            )


def _offered(machine: Machine) -> tuple[int, bool] | None:
    """Feature bits, and whether that is all that the device offers, or only what the kernel's driver took of it."""
    if isinstance(machine.status, dict):
        return int(machine.status["offered_features"]), True
    if machine.virtio is None:
        return None
    try:
        # CONFIG_VIRTIO_DEBUG: a number on each line.
        shown = machine.read(f"sys/kernel/debug/virtio/{machine.virtio.name}/device_features")
    except PermissionError:
        shown = None
    if shown is not None:
        return sum(1 << int(bit) for bit in shown.split()), True
    # A bit string, the lowest first; features_show() in drivers/virtio/virtio.c: what device *and driver* know.
    text = (machine.virtio / "features").read_text().strip()
    return sum(1 << number for number, bit in enumerate(text) if bit == "1"), False


def features(machine: Machine) -> Finding | None:
    if machine.balloon is None:
        return None
    if (offered := _offered(machine)) is None:
        return warn(
            "what the device offers is not known while neither the kernel's driver nor an agent that answers has it",
            "start the agent, and look again as root",
        )
    bits, is_all = offered
    known = BalloonFeature(bits & sum(BalloonFeature))
    names = ", ".join(str(feature.name) for feature in BalloonFeature if feature in known) or "none"
    if is_all:
        if known & (BalloonFeature.CONT_PAGES | BalloonFeature.REPORTING):
            return ok(f"offered: {names}")
        return warn(f"offered: {names}; so the host is told of memory frame by frame", _BETTER)
    if BalloonFeature.REPORTING in known:
        return ok(f"of those that the kernel's driver knows: {names}")
    return warn(
        f"of those that the kernel's driver knows: {names}; whether CONT_PAGES is, too, shows once the agent runs",
        f"unless it has that, {_BETTER}",
    )


def deflate_on_oom(machine: Machine) -> Finding | None:
    offered = _offered(machine)
    if offered is None:
        return None
    if offered[0] & BalloonFeature.DEFLATE_ON_OOM:
        return ok("offered: the balloon gives way below the host's target when the guest runs short")
    if machine.options.relief_below_target == "always":
        return ok("not offered, and relief-below-target is always")
    return warn(
        "not offered: the balloon does not give way below the host's target, whatever the guest needs",
        "on the host: -device virtio-balloon-pci,deflate-on-oom=on (libvirt: autodeflate='on')",
    )


def interrupt_pin(machine: Machine) -> Finding | None:
    if machine.balloon is None:
        return None
    pin = machine.balloon.interrupt_pin
    if pin:
        return ok(f"INT{'?ABCD'[pin]}")
    return fail("the device has no interrupt pin (its register 0x3d is 0)", "let the host give the balloon INTx")


def _obstacle(machine: Machine, function: PciFunction, driver: str) -> Obstacle | None:
    return obstacle(function, driver, machine.sysfs, noiommu=machine.options.vfio_noiommu)


def _candidates(machine: Machine) -> tuple[str, ...]:
    """The drivers that the options allow, the better one first."""
    if machine.options.driver != AUTO:
        return (machine.options.driver,)
    return (VFIO_DRIVER,) if machine.options.vfio_noiommu else DRIVERS


def lockdown(machine: Machine) -> Finding:
    state = host.lockdown(machine.sysfs)
    if state is None:
        return ok("off, or none that this kernel tells of")
    if machine.balloon and VFIO_DRIVER in _candidates(machine) and _obstacle(machine, machine.balloon, VFIO_DRIVER) is None:
        return ok(f"{state}: only {VFIO_DRIVER} is let near the device's registers")
    return fail(
        f"{state}: the kernel lets nobody but {VFIO_DRIVER} near the device's registers, and that is not possible here",
        "give the VM an IOMMU, or boot without lockdown (secure boot off, no lockdown= on the kernel's command line)",
    )


def iommu(machine: Machine) -> Finding | None:
    function = machine.balloon
    if function is None:
        return None
    group = host.group_of(function)
    if group is None:
        if VFIO_DRIVER not in _candidates(machine) or UIO_DRIVER in _candidates(machine):
            return ok(f"none: {UIO_DRIVER} it is, {VFIO_DRIVER} would need one")
        if machine.options.vfio_noiommu:
            return warn(f"none, and {VFIO_DRIVER} is to do without: the device can write anywhere", "give the VM an IOMMU")
        return fail(f"none, which {VFIO_DRIVER} needs", "give the VM an IOMMU, or use --driver auto")
    why = _obstacle(machine, function, VFIO_DRIVER)
    if why is None and VFIO_DRIVER in _candidates(machine):
        return ok(f"group {group.number}: {VFIO_DRIVER} it is")
    found = f"group {group.number}" if why is None else why.found
    offered = _offered(machine)
    if machine.drives is None and offered and offered[0] & TransportFeature.ACCESS_PLATFORM and group.kind != host.IDENTITY:
        return fail(
            f"{found}; it translates what the device addresses, and {UIO_DRIVER} cannot tell it of memory",
            "give the balloon a group of its own, boot with iommu=pt, or leave iommu_platform off on the host",
        )
    if why is None:
        return ok(f"{found}; {UIO_DRIVER} is what the options say")
    return warn(f"{found}: {UIO_DRIVER} it is", why.remedy)


def module(machine: Machine) -> Finding:
    """The module of the first driver that is possible."""
    problems: list[tuple[str, str]] = []
    for driver in _candidates(machine):
        if machine.balloon is not None and _obstacle(machine, machine.balloon, driver) is not None:
            continue
        try:
            problem = host.module_obstacle(driver, machine.root)
        except LookupError as error:
            return warn(f"{driver} is not loaded, and whether it can be is not known: {error}", f"modprobe -n -v {driver}")
        if problem is None:
            state = "is there" if host.is_loaded(driver, machine.root) else "can be loaded"
            return ok(f"{driver} {state}")
        problems.append(problem)
    if not problems:
        return fail("there is no driver that the agent could have the device by", "see iommu and lockdown")
    return fail(*problems[-1])
