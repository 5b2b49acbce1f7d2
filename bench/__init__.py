"""Benchmarks: what the README claims, measured by one command each."""
