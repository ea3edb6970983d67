"""What a search says: its trials, their tables and figures, and what may be concluded from one seed each."""
