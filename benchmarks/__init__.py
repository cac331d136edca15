"""Measurements whose results are kept in docs/results; thin clients of m5."""
