"""The decode benchmark of docs/decode.md: models, the compared systems, a worker process for each,
the figures.
"""
