"""The stopping rules: when a run should end before its last step, or go on at a lower learning rate.

A rule is a class in ``hybrid.stopping.watcher.RULES`` that reads the rows of a run's record; none knows of models or
devices. Their switches and thresholds are the configuration's section ``stopping``.
"""
