"""A virtio memory balloon, driven from userspace."""

__version__ = "0.1.0"
