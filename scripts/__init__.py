"""One verb per file: the result on stdout (one JSON line last), progress on stderr."""
