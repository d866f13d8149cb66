"""Judges of answers: which of two is better, and how good one is."""
