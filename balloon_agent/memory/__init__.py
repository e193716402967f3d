"""Guest memory: runs of frames, pagemap, pins, the sources it is taken from and the processes that hold it."""
