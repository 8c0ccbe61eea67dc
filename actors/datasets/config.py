"""Which data a run trains and is evaluated on."""

from pydantic import Field

from millrace.core.config import Config


class DataConfig(Config):
    """The user's files, and which column holds what."""

    train: str
    """A .jsonl or .parquet file."""
    held_out: str | None = None
    """A second file, never trained on, for evaluation."""
    prompt: str = "prompt"
    """The column with a string, or with chat messages for the tokenizer's chat template."""
    answer: str = "answer"
    """The column with what the verifier compares with; the file may lack it."""
    id: str = "id"
    """The column with the row's name, unique in the file; the file may lack it."""
    columns: tuple[str, ...] | None = None
    """Further columns to keep for the verifier; without it, all."""
    limit: int | None = Field(default=None, ge=1)
    """Read only the first rows of the training file."""
    held_out_limit: int | None = Field(default=None, ge=1)
    """Read only the first rows of the held-out file."""
    shuffle: bool = True
    """Draw each epoch in an order of its own; otherwise in the file's."""
