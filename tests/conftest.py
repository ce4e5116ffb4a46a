"""One thread for all tests, set before torch is imported: runs are compared bit for bit.

With two OpenMP threads a resumed run was seen to differ from an uninterrupted one in the last digits.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
