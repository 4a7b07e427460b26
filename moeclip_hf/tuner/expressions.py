"""Regular expressions for names of modules that a stranger may have written: those that Python is soon done with."""

import re

# One piece of an expression after the other: a group without repetitions or groups in it, a character or set, a bar.
_PIECE = re.compile(
    r"\((?:\?:)?(?P<alternatives>(?:[^()\[\]{}*+?\\]|\\.)*)\)(?P<is_optional>\?)?"
    r"|(?:\[(?:[^\[\]\\]|\\.)+\]|\\.|[^()\[\]{}|*+?\\])(?P<repetition>[*+?]\??)?"
    r"|(?P<bar>\|)"
)
# What a repetition may take; names of modules are hardly longer.
_NAME_LENGTH = 100
_MOST_WAYS = 10**5


def is_bounded(expression: str) -> bool:
    """
    Whether a name is soon matched against an expression, whatever the two are.

    Python's engine goes back to every choice that it made, so that the ways to be tried multiply: with the
    alternatives of each group, with 2 for each `?`, and with the length of the name for each `*` and `+`. Here their
    product has to stay within 10^5, which takes two `*`; what is repeated has to be a single character or set, and
    no group may lie in another.
    """
    ways, in_branches, end = 1.0, 0.0, 0
    while piece := _PIECE.match(expression, end):
        end = piece.end()
        if piece["bar"]:
            in_branches, ways = in_branches + ways, 1.0
        elif piece["alternatives"] is not None:
            ways *= 1 + piece["alternatives"].count("|") + bool(piece["is_optional"])
        elif repetition := piece["repetition"]:
            ways *= 2 if repetition[0] == "?" else _NAME_LENGTH
    return end == len(expression) and in_branches + ways <= _MOST_WAYS
