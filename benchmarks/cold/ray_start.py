"""Ray's start as a run needs it: from nothing to a connected driver."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys

from millrace.cluster.runtime import ray_cluster

if __name__ == "__main__":
    with ray_cluster():
        print("ready", flush=True)
        sys.stdin.read()
