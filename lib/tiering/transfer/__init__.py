"""Bringing bytes from stores into slots of fast memory, really or on a clock; weights aren't known
here.
"""
