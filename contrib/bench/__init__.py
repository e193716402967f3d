"""Benchmarks: programs that measure one part each, and print JSON."""
