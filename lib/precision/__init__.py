"""How precisely weights are stored, how they are computed with, and what that costs in quality.

``layout`` says where each byte of a record lies (no torch), ``planes`` packs codes into bits,
``codecs`` encodes, decodes and checks records (the reference), ``kernels`` computes with them where
they are not expanded, ``storage`` says how each parameter of a model is stored. ``perturb`` puts a
precision's error into a model, ``quality`` measures what it does to the output, ``sensitivity``
predicts that from a signal, ``calibration`` says how far to trust the prediction.
"""
