"""One thread for all tests, set before torch is imported: small work is fastest so on a busy machine.

In the environment, so that processes started by tests have as many: runs that are compared bit for bit must.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
