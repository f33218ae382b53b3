"""Text: files, documents and token sequences to train, measure and judge on; models are not run
here.
"""
