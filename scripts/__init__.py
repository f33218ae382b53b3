"""One verb per file; each prints its result on stdout (one JSON line last) and progress on stderr."""
