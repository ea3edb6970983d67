"""Records to answers: reads run folders, compares arms, writes tables, figures and one page.

The rooms before this one are known only by the files that they leave behind: nothing here imports torch, Hydra or
the model. Start at ``analysis.report``; ``records`` are read, ``statistics`` computed, ``comparison`` and ``search``
say what follows, ``tables``, ``figures`` and ``page`` show it.
"""
