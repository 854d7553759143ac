"""Escape text before it reaches a terminal, where control characters could rewrite what a user sees."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Return text with control and other invisible characters escaped, such as those that turn text around.

    Args:
        text: for example, a line with text of a dataset or of a chat template's error.
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
