"""Judge data: reward workers, verifiers."""

if __name__ == "rewards":
    raise ImportError("write 'import millrace.rewards': the bare name would load a second copy of every class")
