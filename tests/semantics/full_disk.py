"""Trains on after no file may grow beyond a few kilobytes, which is what a full disk looks like."""

import resource
import sys

from training import steps

steps(5)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
print("loss", steps(3000))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sys.exit(4)
