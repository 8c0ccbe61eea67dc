"""A model's tokenizer and config, without the model: neither imports what models compute with."""

import os
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from millrace.core.errors import ModelError, boundary
from millrace.learner.table_config import TableConfig


def require_files(name: str, what: str) -> None:
    """A name that looks like a path must be a directory with a config."""
    path = Path(name)
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~", os.sep))
    if not path.is_dir():
        if not is_hub_id:
            raise ModelError(
                f"{what} {name}: no such directory; give one with config.json, or a hub id like owner/name"
            )
    elif not (path / "config.json").is_file():
        raise ModelError(f"{what} {name}: the directory has no config.json; save it with `save_pretrained`")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    require_files(name, "model")
    try:
        with boundary(f"loading the tokenizer of model {name}", ModelError):
            if isinstance(config_of(name), TableConfig):  # which transformers has no tokenizer of its own for
                tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
            else:  # looked up when it is needed: its import takes seconds
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except ModelError as caught:
        raise ModelError(
            f"model {name} has no tokenizer that loads; save one beside it with `tokenizer.save_pretrained`. {caught}"
        ) from caught
    # Without files, transformers makes an empty tokenizer of the model's type and says nothing.
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise ModelError(f"model {name} has no tokenizer; save one beside it with `tokenizer.save_pretrained`")
    size = config_of(name).get_text_config().vocab_size
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= size:
        raise ModelError(
            f"model {name}: its tokenizer has no eos_token among the model's {size} tokens (it is"
            f" {tokenizer.eos_token!r}, {tokenizer.eos_token_id}), so no answer could ever end; set one and save it"
        )
    return tokenizer


def config_of(name: str) -> PreTrainedConfig:
    """Of a model directory or hub id. Raises ModelError."""
    with boundary(f"loading the config of model {name}", ModelError):
        return AutoConfig.from_pretrained(name)
