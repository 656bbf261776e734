"""Benchmarks: what is measured is what users run, beside something to compare it with, interleaved in one process."""
