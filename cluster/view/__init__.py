"""The live view of a run in a terminal: `live.py` follows a job, `screen.py` draws it, purely."""
