"""What the branches of trained models do, from the diagnosis.json files that ``python -m hybrid.diagnose`` writes."""
