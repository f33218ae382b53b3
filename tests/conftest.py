"""What every test runs under, and the commands that tests start."""

import os

# Before torch is imported. Tiny tensors on few cores: threads would spend their time waiting for
# each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TIERHINTS_MACHINE"] = ""  # whoever runs the tests may have probed the machine
os.environ["TIERHINTS_RECORDS"] = ""  # only the tests of kept records leave some

from lib.codecs.native import load_native  # noqa: E402

load_native()  # built before the first test, and not by a command whose output a test reads
