"""The study of Adam's moment as a Fisher diagonal, for docs/signals_study.md: runs, measurements,
conclusions.
"""
