"""Benchmarks with Linux guests: the guests, the VMMs that run them side by side, and where they can run."""
