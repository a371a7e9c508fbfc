"""Changes its working directory, removes the one it came from with the run directory in it, and leaves by os._exit."""

import os
import shutil
import sys

from training import steps

begun = os.getcwd()
print("loss", steps(20))
os.chdir("/")
if "remove" in sys.argv:
    shutil.rmtree(os.path.join(begun, "gradctl-runs"), ignore_errors=True)
print("loss", steps(2000), flush=True)
os._exit(9)
