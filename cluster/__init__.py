"""The top: configuration, wiring, jobs. The only folder that imports ray."""

if __name__ == "cluster":
    raise ImportError("write 'import millrace.cluster': the bare name would load a second copy of every class")
