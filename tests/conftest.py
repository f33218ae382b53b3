"""Tiny tensors on few cores: threads would spend their time waiting for each other."""

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported; commands that tests start inherit it
)
