"""Decides whether a response to a quickstart prompt is right. Shares nothing with `make_data.py`."""

import re

ASCENDING = ("from smallest to largest", "in ascending order", "going up")
DESCENDING = ("from largest to smallest", "in descending order", "going down")


def is_right(prompt: str, response: str) -> bool:
    """True if `response` holds exactly the digits of the prompt's number, in the order the prompt asks for.

    Raises:
        ValueError: the prompt asks for neither order, for both, or about no one number.
    """
    ascending, descending = (any(words in prompt for words in order) for order in (ASCENDING, DESCENDING))
    asked = re.findall(r"\d+", prompt)
    if ascending == descending or len(asked) != 1:
        raise ValueError(f"prompt must name one number and one order, got {prompt!r}")
    given = re.findall(r"\d+", response)
    return given == ["".join(sorted(asked[0], reverse=descending))]
