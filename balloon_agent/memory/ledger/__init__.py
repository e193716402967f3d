"""The ledger: all extents in the balloon, by frame and by size. Pure bookkeeping, no I/O."""
