"""Seeds that depend on a purpose and not on the process, the clock or the number of shards."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Return a stable 31-bit seed for a purpose, such as (seed of a stage, "answers", batch).

    hashlib and not `hash`: Python salts the latter per process.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
