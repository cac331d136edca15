from __future__ import annotations


def write_pages(report, out):
    return []
