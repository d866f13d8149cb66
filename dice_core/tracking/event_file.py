"""TensorBoard's event files, written and read: TFRecords of `Event` messages with scalars.

The format is 30 lines of two message types and a checksum. The package tensorboard would bring gRPC and its own bounds
on protobuf into every image that trains; it serves the files (`make board`), and the tests read them with it.
Source: tensorflow/core/util/event.proto, framework/summary.proto and lib/io/record_writer.cc. Pure.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FILE_VERSION = "brain.Event:2"
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Event:
    """Scalars of a step."""

    time: float
    """Seconds since 1970."""
    step: int
    values: Mapping[str, float]
    """By tag; kept as float32."""


def first_record(time: float) -> bytes:
    """Return what an event file begins with."""
    return _record(_double(1, time) + _bytes(3, FILE_VERSION.encode()))


def event_record(event: Event) -> bytes:
    """Return an event as a record, to be appended to a file."""
    values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in event.values.items())
    return _record(_double(1, event.time) + _integer(2, event.step) + _bytes(5, values))


def read_events(data: bytes) -> Iterator[Event]:
    """Yield the events of a file that have values; a last record that is cut ends it, as in TensorBoard.

    Raises:
        ValueError: a checksum is wrong.
    """
    start = 0
    while start + 12 <= len(data):
        header = data[start : start + 8]
        (length,), (crc,) = struct.unpack("<Q", header), struct.unpack("<I", data[start + 8 : start + 12])
        if crc != _masked_crc32c(header):
            raise ValueError(f"not an event file: wrong checksum of the length at byte {start}")
        body, end = data[start + 12 : start + 12 + length], start + 16 + length
        if end > len(data):
            return
        if struct.unpack("<I", data[end - 4 : end])[0] != _masked_crc32c(body):
            raise ValueError(f"not an event file: wrong checksum of the record at byte {start}")
        event = _read_event(body)
        if event.values:
            yield event
        start = end


def _read_event(body: bytes) -> Event:
    time, step, values = 0.0, 0, {}
    for number, value in _fields(body):
        if number == 1 and isinstance(value, bytes):
            (time,) = struct.unpack("<d", value)
        elif number == 2 and isinstance(value, int):
            step = value
        elif number == 5 and isinstance(value, bytes):
            for _, entry in _fields(value):
                fields = dict(_fields(entry)) if isinstance(entry, bytes) else {}
                tag, scalar = fields.get(1), fields.get(2)
                if isinstance(tag, bytes) and isinstance(scalar, bytes):
                    values[tag.decode()] = float(struct.unpack("<f", scalar)[0])
    return Event(time, step, values)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield a protobuf message's fields: a varint as a number, all others as their bytes."""
    start = 0
    while start < len(message):
        key, start = _read_varint(message, start)
        kind = key & 7
        if kind == _VARINT:
            number, start = _read_varint(message, start)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            length, start = _read_varint(message, start)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}[kind]
        yield key >> 3, message[start : start + length]
        start += length


def _read_varint(data: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return value, start


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _integer(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _key(number, _FIXED64) + struct.pack("<d", value)


def _float(number: int, value: float) -> bytes:
    # Beyond float32 is infinite, as in a cast; struct would refuse it.
    largest = 3.4028234663852886e38
    return _key(number, _FIXED32) + struct.pack("<f", value if abs(value) <= largest else value * float("inf"))


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(value)) + value


def _record(body: bytes) -> bytes:
    header = struct.pack("<Q", len(body))
    return header + struct.pack("<I", _masked_crc32c(header)) + body + struct.pack("<I", _masked_crc32c(body))


def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        return value

    return tuple(entry(number) for number in range(256))


_TABLE = _table()


def _masked_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
