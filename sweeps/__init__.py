"""Sweeps: what is compared, and how its runs are planned, started, skipped and counted."""
