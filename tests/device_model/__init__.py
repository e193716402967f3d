"""A virtio balloon *device*, written from the specification, for tests of the driver."""
