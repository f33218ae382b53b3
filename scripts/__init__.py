"""What needs the checkout: the benchmark, the pipeline behind make, Kconfig and doctor. Verbs that
need the library alone are in lib/commands.
"""
