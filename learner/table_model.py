"""A softmax table as a Hugging Face causal language model: what tests train in milliseconds.

The logits behind token v at position p are the row ``table[v, min(p, L - 1)]``. It knows nothing of the tokens
before v, so a task it can learn is one whose next token follows from the last one and the position.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from millrace.learner.table_config import TableConfig


class TableForCausalLM(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed
    """One parameter, `table` [V, L, V]: zeros give the uniform policy."""

    config_class = TableConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.table = torch.nn.Parameter(torch.zeros(config.vocab_size, config.positions, config.vocab_size))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The table starts as zeros."""

    def get_output_embeddings(self) -> None:
        """None: logits come from `forward`."""

    def get_input_embeddings(self) -> None:
        """None: tokens index the table."""

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [batch, kept, V] behind the tokens [batch, C]."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        place = position_ids[:, kept].clamp(max=self.config.positions - 1)
        return CausalLMOutput(logits=self.table[input_ids[:, kept], place])


AutoModelForCausalLM.register(TableConfig, TableForCausalLM, exist_ok=True)
