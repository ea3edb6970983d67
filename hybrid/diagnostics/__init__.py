"""What the branches of a trained model do: which are needed, what the gates open to, how far back each remembers.

``hybrid.diagnose`` is the command; ``document`` puts the measurements of one run together. Each other module measures
one thing on a model and on windows of text, and knows nothing of folders.
"""
