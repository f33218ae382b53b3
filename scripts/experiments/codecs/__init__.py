"""Timing of codecs and kernels by shape, for docs/codecs.md; the codecs are in lib/codecs."""
