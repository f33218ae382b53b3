"""Records of packed weights: layout, encoding, and kernels that compute with them. What they cost:
``precision``.
"""
