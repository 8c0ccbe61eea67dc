"""Ray in a process leaves its signals to it."""

import subprocess
import sys

import pytest

WHILE_RAY_IS_UP = """
import os, signal, threading, time
from millrace.cluster.runtime import ray_cluster

def work():
    with ray_cluster():
        up.set()
        over.wait()

heard, up, over = [], threading.Event(), threading.Event()
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
if {thread}:
    thread = threading.Thread(target=work)
    thread.start()
    up.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    over.set()
    thread.join()
else:
    with ray_cluster():
        os.kill(os.getpid(), signal.SIGTERM)
print(heard)
"""


@pytest.mark.ray
@pytest.mark.parametrize("thread", [False, True])
def test_a_process_hears_sigterm_whichever_thread_started_ray(thread: bool) -> None:
    code = WHILE_RAY_IS_UP.format(thread=thread)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[15]\n"), done.stderr[-2000:]
