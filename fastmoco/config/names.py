"""Names that people gave, of folders and classes and runs, as text for a figure."""

from __future__ import annotations

import unicodedata


def in_figure(name: str) -> str:
    """The name as matplotlib draws it sign by sign, on one line.

    Two dollars would begin and end a formula, perhaps a wrong one, at which matplotlib ends, as it
    does at the surrogates of a file's name that is no text. What begins with an underscore would
    be left out of a legend.
    """
    drawn = "".join(sign if sign.isprintable() else _escape(sign) for sign in name)
    return f"{' ' * drawn.startswith('_')}{drawn}".replace("$", r"\$")


def _escape(sign: str) -> str:
    blank = unicodedata.category(sign) == "Zs"
    return " " if blank else sign.encode("unicode_escape").decode()
