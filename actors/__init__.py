"""Make data: the prompt source, generation workers, engines."""

if __name__ == "actors":
    raise ImportError("write 'import millrace.actors': the bare name would load a second copy of every class")
