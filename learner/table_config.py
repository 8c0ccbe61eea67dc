"""The config of a softmax table, which opens without the model and what that imports."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class TableConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """Sizes of the table: `vocab_size` V and `positions` L."""

    model_type = "millrace_table"

    def __init__(self, vocab_size: int = 2, positions: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.positions = positions


AutoConfig.register(TableConfig.model_type, TableConfig, exist_ok=True)
