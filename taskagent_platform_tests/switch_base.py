"""A base model for the domain of lamps: a two-layer Llama that has learned, in a minute, to speak of them.

It calls tools as the platform's models do, but mixes up which is which: what a request asks for is left to fine-tuning.
"""

import json
from datetime import datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from taskagent_platform.domains.base import Message
from taskagent_platform_tests.switch_domain import SWITCHES

_VOCABULARY = 512
_SEED = 42
_MIXED_UP = {"switch_on": "switch_off", "switch_off": "remove_lamp", "remove_lamp": "switch_on"}
_STEPS = 400
_BATCH = 16


def make_switch_base(folder: Path) -> None:
    """Writes a small pre-trained model and a byte-level tokenizer of its own, in Hugging Face's format."""
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
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config)
        _pretrain(model, wrapped)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)


def _pretrain(model: Any, tokenizer: Any) -> None:
    """Trains all weights on conversations whose tools are mixed up."""
    import torch

    from taskagent_platform.training import template

    tokenizer.chat_template = template.chat_template()
    rendered = [template.render(messages, SWITCHES.openai_tools(), tokenizer) for messages in _conversations()]
    order = cycle(torch.randperm(len(rendered)).tolist())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_STEPS)
    for _ in range(_STEPS):
        batch = [rendered[next(order)] for _ in range(_BATCH)]
        longest = max(len(one.input_ids) for one in batch)
        rows = [(len(one.input_ids), longest - len(one.input_ids), one) for one in batch]
        loss = model(
            input_ids=torch.tensor([one.input_ids + [0] * rest for _, rest, one in rows]),
            attention_mask=torch.tensor([[1] * length + [0] * rest for length, rest, _ in rows]),
            labels=torch.tensor([one.labels + [template.IGNORED] * rest for _, rest, one in rows]),
        ).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _conversations() -> list[list[Message]]:
    moments = [datetime(2024, 1, 1 + day, 9) for day in range(20)]
    made = [
        example.messages
        for source, count in (("structured_outputs", 120), ("multi_tool", 200))
        for example in SWITCHES.generate(source, count, _SEED + 1, moments)
    ]
    for messages in made:
        for call in (call for message in messages for call in message.get("tool_calls", [])):
            name = call["function"]["name"]
            call["function"]["name"] = _MIXED_UP.get(name, name)
    return made


def _texts() -> list[str]:
    moments = [datetime(2024, 1, 15, 9)]
    examples = [example for source in SWITCHES.sources for example in SWITCHES.generate(source, 60, _SEED, moments)]
    messages = [message for example in examples for message in example.messages]
    said = [message["content"] for message in messages]
    called = [json.dumps(call["function"]) for message in messages for call in message.get("tool_calls", [])]
    return [*said, *(text.capitalize() for text in said), *called, *(json.dumps(SWITCHES.openai_tools()),) * 20]
