"""Learn from data: batches, objectives, the optimiser, published weights."""

if __name__ == "learner":
    raise ImportError("write 'import millrace.learner': the bare name would load a second copy of every class")
