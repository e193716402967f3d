"""The virtio 1.x specification and nothing else: flags, PCI capabilities, common configuration, split virtqueue."""
