"""Ray in a process leaves its signals to it."""

import subprocess
import sys

import pytest

WHILE_RAY_IS_UP = """
import os, signal, threading
from millrace.cluster.runtime import ray_cluster

def work():
    with ray_cluster():
        up.set()
        over.wait()

heard, up, over = [], threading.Event(), threading.Event()
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
thread = threading.Thread(target=work)
thread.start()
up.wait()
os.kill(os.getpid(), signal.SIGTERM)
over.set()
thread.join()
print(heard)
"""


@pytest.mark.ray
def test_a_process_hears_sigterm_where_another_thread_started_ray() -> None:
    done = subprocess.run([sys.executable, "-c", WHILE_RAY_IS_UP], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[15]\n"), done.stderr[-2000:]
