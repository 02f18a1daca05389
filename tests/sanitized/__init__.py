"""Builds of chv's compiled modules with instruments: AddressSanitizer, or counters of edges for the fuzzers.

``python -m tests.sanitized address -- pytest -q tests/unit/test_irq.py`` builds in a folder of its own,
beside the normal build, and runs a module there.
"""
