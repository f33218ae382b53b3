"""What offloaders do with damaged files and unusual models, for docs/offload_benchmark.md."""
