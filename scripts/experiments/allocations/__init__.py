"""Allocations of precision compared at equal bytes, for docs/allocation.md; the allocation is in
lib/precision.
"""
