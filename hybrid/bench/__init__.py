"""Benchmarks: ``python -m hybrid.bench gpu|cpu|matrix|memory|compare``. See ``--help``; importing this is cheap."""
