"""The kernel's drivers that give a PCI function to userspace, by their names in sysfs."""

from __future__ import annotations

UIO_DRIVER = "uio_pci_generic"
VFIO_DRIVER = "vfio-pci"
# The better one first: what it gives to userspace cannot write to memory that it was not given, and is reset in the end.
DRIVERS = (VFIO_DRIVER, UIO_DRIVER)
