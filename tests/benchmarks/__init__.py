"""Ours and each peer's way on the same work in one run: `make bench`. README.md says how to read what it writes."""
