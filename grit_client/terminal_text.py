"""Texts of others on a terminal: names, reasons and answers must not be able to drive it."""


def printable(text: str) -> str:
    """Return a text with control characters written out; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )
