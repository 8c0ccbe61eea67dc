"""theirs.py is a program for another environment: nothing here imports it."""

collect_ignore = ["theirs.py"]
