"""The virtio balloon device: spec 5.5, and VIRTIO_BALLOON_F_CONT_PAGES as proposed in 2020."""
