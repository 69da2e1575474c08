"""The evidence of a search for people to read: one HTML page, Markdown, JSON and a still figure.

`write(result, folder)` is the whole face of this room: it draws a result (plain JSON) and never
computes a number that a search should have obtained.
"""

from espalier.report.write import write

__all__ = ["write"]
