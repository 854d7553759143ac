"""`fastdpo doctor`."""

from typing import Any


def doctor(model: str | None, options: dict[str, Any]) -> None:
    """Check this machine: versions, devices, head and attention, with a ten-second test of accuracy and speed."""
