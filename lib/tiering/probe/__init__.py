"""Measuring this machine's tiers and compute for machine.json; what the figures mean is in
``lib.machine``.
"""
