"""One file a figure; ``style`` is what they share, ``drawing`` writes those that there is data for."""
