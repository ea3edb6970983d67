"""The forms of a report: the web page, the Markdown file and the terminal's lines."""
