"""Experiments: one folder per subject, each run for a page of docs/. Nothing imports them."""
