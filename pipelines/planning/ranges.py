"""Numbers that are known as a low and a high bound: what is estimated is never told as one exact figure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Two bounds, of no negative number. A figure that is exact has the same twice."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse bounds that are none."""
        if not 0 <= self.low <= self.high:
            raise ValueError(f"a range goes from a low to a high bound, none below 0, got {self.low} to {self.high}")

    def __add__(self, other: "Range | float") -> "Range":
        """Add bound to bound."""
        other = as_range(other)
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: "Range | float") -> "Range":
        """Multiply bound by bound."""
        other = as_range(other)
        return Range(self.low * other.low, self.high * other.high)

    def __truediv__(self, other: "Range | float") -> "Range":
        """Divide: the low bound by the high one, and the other way round."""
        other = as_range(other)
        return Range(self.low / other.high, self.high / other.low)


def exactly(value: float) -> Range:
    """Return the range of one number."""
    return Range(value, value)


def as_range(value: Range | float) -> Range:
    """Return a number as a range, and a range as it is."""
    return value if isinstance(value, Range) else exactly(value)
