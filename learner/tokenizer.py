"""A model's tokenizer and config, without the model: neither imports what models compute with."""

import ast
import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from millrace.core.errors import ModelError, boundary
from millrace.learner import table_config

_ = table_config.TableConfig  # imported for its registration with AutoConfig

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the same class, by its old and its new name
OWN = "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"


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
            # AutoTokenizer is looked up when it is needed: its import takes seconds.
            kind = PreTrainedTokenizerFast if _is_generic(name) else transformers.AutoTokenizer
            tokenizer = kind.from_pretrained(name)
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


def _is_generic(name: str) -> bool:
    """Whether AutoTokenizer would take the class that reads tokenizer.json as it is, as far as files say."""
    directory = Path(name)
    file = directory / "tokenizer_config.json"
    if not file.is_file() or not (directory / "tokenizer.json").is_file() or (directory / "tekken.json").exists():
        return False
    said, config, own = json.loads(file.read_text()), config_of(name), own_tokenizers()
    if own is None or "auto_map" in said or said.get("tokenizer_class") not in GENERIC:
        return False
    return not own & {config.model_type, getattr(config, "model_name", None)}


@cache
def own_tokenizers() -> frozenset[str] | None:
    """Model types whose tokenizer is transformers' own, whatever its files say; None where that cannot be told.

    Read from the source of AutoTokenizer's module, which is not imported.
    """
    spec = find_spec("transformers.models.auto.tokenization_auto")
    if spec is None or spec.origin is None:
        return None
    for statement in ast.parse(Path(spec.origin).read_text()).body:
        if (
            isinstance(statement, ast.AnnAssign)
            and ast.unparse(statement.target) == OWN
            and statement.value is not None
        ):
            return frozenset(ast.literal_eval(statement.value))
    return None


def config_of(name: str) -> PreTrainedConfig:
    """Of a model directory or hub id. Raises ModelError."""
    with boundary(f"loading the config of model {name}", ModelError):
        return AutoConfig.from_pretrained(name)
