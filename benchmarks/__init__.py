"""Every published number is one command here: ``python -m benchmarks.NAME [--quick] --json FILE``."""
