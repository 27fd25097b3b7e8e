"""A base model for the domain of lamps: a two-layer Llama whose few words make it learn in seconds."""

import json
from datetime import datetime
from pathlib import Path

from taskagent_platform_tests.switch_domain import SWITCHES

_VOCABULARY = 512
_SEED = 42


def make_switch_base(folder: Path) -> None:
    """Writes a model with random weights and a byte-level tokenizer of its own, in Hugging Face's format."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytes_first = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = bytes_first
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=bytes_first.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def _texts() -> list[str]:
    moments = [datetime(2024, 1, 15, 9)]
    examples = [example for source in SWITCHES.sources for example in SWITCHES.generate(source, 60, _SEED, moments)]
    messages = [message for example in examples for message in example.messages]
    said = [message["content"] for message in messages]
    called = [json.dumps(call["function"]) for message in messages for call in message.get("tool_calls", [])]
    return [*said, *(text.capitalize() for text in said), *called, *(json.dumps(SWITCHES.openai_tools()),) * 20]
