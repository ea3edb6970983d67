"""The specification's gates: checks on a run's record while it is made, each a small class in ``ALL``.

A gate reads the run's environment and rows and knows nothing of models, so it can be tried on any series of rows.
``hybrid.gates.watching`` lets them look at a run; ``python -m hybrid.gates`` tries a configuration before it is run.
"""
