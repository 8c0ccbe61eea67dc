"""Datasets: readers of the user's files, and tasks that are generated. Loading is loading.py's."""

from millrace.actors.datasets.files import jsonl, parquet
from millrace.actors.datasets.synthetic import arithmetic, sorting

__all__ = ["arithmetic", "jsonl", "parquet", "sorting"]
