"""Dumps of outputs, plans and predictions of fixed cases, to compare two versions of the code."""
