"""Benchmarks: what a tick, a call and a start cost, and how like the whole model a smaller one is."""
