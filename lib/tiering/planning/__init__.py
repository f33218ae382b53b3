"""From a model, hints and a budget to what ``policy`` plans with, and to its plan; nothing is moved
here.
"""
