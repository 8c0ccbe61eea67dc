"""``python -m millrace`` is the console script, also where the package is not installed."""

from millrace.cluster.cli import main

if __name__ == "__main__":
    main()
