"""Texts of others on a terminal: names, reasons and answers must not be able to drive it."""


def printable(text: str) -> str:
    """Return a text with control characters written out; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )


def settle(text: str) -> str:
    """Return a log as a terminal leaves it: of a line that was written over, the last state."""
    if "\r" not in text:
        return text
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
