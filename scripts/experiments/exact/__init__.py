"""Exact output: is the text the full model's own, and how much of a draft is accepted."""
