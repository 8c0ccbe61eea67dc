"""The bottom: data types, the catalogue, the replay queue. Imports nothing of ours."""

if __name__ == "core":
    raise ImportError("write 'import millrace.core': the bare name would load a second copy of every class")
