"""Linux, as it offers itself to any process: system calls, files of /proc and /sys, pins, memory blocks. It keeps no state."""
