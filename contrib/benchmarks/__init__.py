"""Benchmarks, beside the kernel's own driver in the same run: on a shared machine only the ratio means anything."""
