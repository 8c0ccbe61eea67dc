"""A character-level Llama with random weights, for one core: `python examples/tiny_model.py DIRECTORY`.

Each printable ASCII character and the newline is one token; the end-of-sequence token ends a response. The directory
opens with `AutoModelForCausalLM`, `AutoTokenizer` and vLLM. Its chat template makes of messages:

    <bos>user:sort 4453
    assistant:3445<eos>
    user:reverse
    assistant:
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT_TOKENS = 256

# Role, colon, content, newline; what the assistant said ends as its responses do.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role + ':' + message.content + (eos_token if message.role == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, ids in the order of SPECIAL and CHARACTERS; adds no special token by itself."""
    pad, bos, eos, unk = SPECIAL
    # Byte-pair encoding without a single merge splits a text into its characters.
    characters = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, merges=[], unk_token=unk)
    )
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        chat_template=CHAT_TEMPLATE,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def config() -> LlamaConfig:
    """The dimensions; heads of 32, which vLLM's CPU attention takes.

    Llama and not Qwen2: `AutoTokenizer` splits every Qwen2 model's texts in Qwen2's own way, which loses spaces here.
    """
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        # Three times the usual spread: so small a model learns from the first steps, where 0.02 idles for hundreds.
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build(directory: Path, *, seed: int = 0) -> None:
    """Write model and tokenizer to `directory`; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config())
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.directory, seed=arguments.seed)
    print(f"{sum(p.numel() for p in LlamaForCausalLM(config()).parameters()):,} parameters in {arguments.directory}")
