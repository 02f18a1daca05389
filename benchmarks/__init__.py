"""What chv costs, beside a C program and QEMU: one module a question, ``python -m benchmarks.NAME``.

docs/benchmarks.md says how each figure is taken and what it does not show.
"""
