"""What a precision costs in quality, and which one each block gets. Records are in ``codecs``.

``perturb`` puts a precision's error into a model, ``quality`` measures what that does to the
output, ``sensitivity`` predicts it from a signal, ``tolerance`` says how far to trust the
prediction, ``binomial`` what a count says of a chance. ``allocate`` chooses precisions, ``floors``
turns epsilon into what each block may cost, ``plans`` draws random plans to check that, ``sizes``
counts bytes, ``pruning`` scores weights to set to zero.
"""
