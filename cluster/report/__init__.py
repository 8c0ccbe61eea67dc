"""report.html: a run directory as one page that needs nothing else."""
