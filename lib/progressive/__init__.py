"""Working state that is held in fewer bits while a request runs: the KV cache. Weights are in
``tiering``.
"""
