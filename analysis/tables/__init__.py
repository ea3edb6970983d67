"""Tables: raw numbers as data frames, words as Markdown, LaTeX and HTML."""
