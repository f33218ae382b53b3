"""Hooks and guards on a model's modules, and their removal without a trace; no bytes are moved
here.
"""
