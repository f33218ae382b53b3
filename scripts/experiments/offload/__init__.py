"""What bench_offload.py runs: a checkpoint, the systems compared, one process each, the figures."""
