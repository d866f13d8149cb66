"""TensorBoard's event files: bytes that are known, and what a reader makes of whole and cut files."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dice_core.tracking.event_file import Event, _masked_crc32c, event_record, first_record, read_events

FINITE = st.floats(allow_nan=False, width=32)


def test_the_checksum_is_crc32c() -> None:
    """RFC 3720, B.4: 32 bytes of zeros and of ones; then the mask of TensorFlow's record files."""
    for data, crc in ((b"\x00" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"123456789", 0xE3069283)):
        rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
        assert _masked_crc32c(data) == (rotated + 0xA282EAD8) & 0xFFFFFFFF


def test_an_event_is_these_bytes() -> None:
    """By hand from event.proto: wall_time (1, double), step (2, varint), summary (5) of value (1) of tag and float."""
    scalar = b"\x0a\x01a\x15\x00\x00\x80\x3f"
    body = b"\x09" + struct.pack("<d", 2.5) + b"\x10\xac\x02" + b"\x2a\x0a" + b"\x0a\x08" + scalar
    record = event_record(Event(2.5, 300, {"a": 1.0}))
    assert record[12:-4] == body
    assert record[:8] == len(body).to_bytes(8, "little")


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            Event,
            st.floats(0, 4e9),
            st.integers(0, 2**40),
            st.dictionaries(st.text(min_size=1, max_size=8), FINITE, min_size=1, max_size=3),
        ),
        max_size=4,
    ),
    st.integers(0, 200),
)
def test_what_is_written_is_read_and_a_cut_file_gives_its_whole_events(events: list[Event], cut: int) -> None:
    records = [event_record(event) for event in events]
    data = first_record(1.0) + b"".join(records)
    assert list(read_events(data)) == events
    kept = data[: max(len(data) - cut, 0)]
    found = list(read_events(kept))
    assert found == events[: len(found)]
    num_bytes = len(first_record(1.0)) + sum(map(len, records[: len(found) + 1]))
    assert len(found) == len(events) or num_bytes > len(kept)


def test_a_number_beyond_float32_is_infinite() -> None:
    (event,) = read_events(event_record(Event(0.0, 0, {"large": 1e300, "small": -1e300})))
    assert event.values == {"large": math.inf, "small": -math.inf}


def test_a_changed_byte_is_told() -> None:
    data = bytearray(event_record(Event(0.0, 1, {"loss": 0.5})))
    data[-6] ^= 1
    with pytest.raises(ValueError, match="checksum of the record"):
        list(read_events(bytes(data)))
