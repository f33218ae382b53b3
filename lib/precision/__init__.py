"""How precisely weights are stored, and how they are computed with where they are not expanded.

``layout`` says where each byte of a record lies (no torch), ``planes`` packs codes into bits,
``codecs`` encodes, decodes and checks records (the reference), ``kernels`` computes with them.
"""
