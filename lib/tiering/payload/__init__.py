"""What moves: groups of blocks and their bytes, raw or as records. Where they lie is up to
``stores``.
"""
