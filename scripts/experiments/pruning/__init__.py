"""Scores of pruning compared at equal sparsity, for docs/pruning.md; the scores are in
lib/precision.
"""
