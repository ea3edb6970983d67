"""What a sweep says: the baseline, the differences, what was matched, the factors, and all of it in words."""
