"""How userspace reaches a PCI function on Linux: finding it, taking it from its driver, registers, interrupts, memory."""
