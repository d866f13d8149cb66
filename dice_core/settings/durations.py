"""Spans of time as people write them: 90s, 30m, 12h, 7d."""

import re

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_DURATION = re.compile(r"([1-9]\d*)([smhd])")


def to_seconds(text: str) -> int:
    """Return the seconds of a span such as `12h`.

    Raises:
        ValueError: not a whole number and a unit.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"must be a whole number and one of s, m, h, d, such as 30m, 12h or 7d, got {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def show_duration(seconds: float) -> str:
    """Return a span for people, in its two largest units: `1h 5m`."""
    rest, words = int(seconds), []
    for unit, length in sorted(_SECONDS.items(), key=lambda item: -item[1]):
        if rest >= length:
            words.append(f"{rest // length}{unit}")
            rest %= length
    return " ".join(words[:2]) or "0s"
