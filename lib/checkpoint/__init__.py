"""Reading checkpoints from disk, and building models without their weights; no placement, no
training.
"""
