"""Emulated time against real offload of the same plans, for docs/offload.md; the emulation is in
lib/tiering/transfer.
"""
