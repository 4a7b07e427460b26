"""What is said on a terminal."""


def one_line(text: str) -> str:
    """The text with what is not printed escaped: file names may hold lines, bytes of no letter, even commands."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
