"""The offload benchmark of docs/offload_benchmark.md: a checkpoint, the peers, a process for each
run, the figures.
"""
