"""The chat template: one token stream for training and for serving.

The same Jinja file renders training examples here and requests in the server; it travels inside the model's folder.
Only its first line, what stands around turns and words, differs between base models.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from taskagent_platform.errors import PlatformError

TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_FILE = Path(__file__).with_name(TEMPLATE_NAME)
IGNORED = -100
"""The label of a token that is not learned."""


class ControlTokens(NamedTuple):
    """What stands around a turn, for one family of base models."""

    document_start: str
    role_start: str
    role_end: str
    turn_end: str

    @property
    def end_token(self) -> str:
        """The token that ends a turn; generation stops at it."""
        return self.turn_end.strip()


CHATML = ControlTokens("", "<|im_start|>", "\n", "<|im_end|>\n")
LLAMA3 = ControlTokens("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")

CALL_TOKENS = (
    '<tool_call>{"name": "',
    '", "arguments": {',
    "}}</tool_call>",
    '": "',
    '", "',
    '": ["',
)
"""What stands around every name and value of a call, in the template's spelling.

A tokenizer that was not made for calls spells two fifths of an answer's tokens on it; as tokens of their own, they cost
one each, in training and in decoding.
"""
WORD_START = " "
"""What the template puts before a word that is to be copied, for a tokenizer that has the tokens of calls.

After a quote, a word is spelled with other tokens than after a space: "tractor" is ``tract`` and ``or``. A small model
has to learn both spellings of every word to copy a title into a call, and takes a wrong word where it did not. So the
first word of a message, of a quoted text and of a value follows a space, like all others. What the model says loses
these spaces again in the tokenizer's decoder; see :data:`DECODED`.
"""
DECODED = {f' "{WORD_START}': ' "', f'["{WORD_START}': '["'}
"""What the decoder of a tokenizer that has the tokens of calls replaces, and by what."""


class Rendered(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: the token ids of the whole conversation.
        labels: the same ids where the assistant speaks (its end of turn included), elsewhere ``IGNORED``;
            not shifted: ``labels[i]`` is learned from the tokens before ``i``.
    """

    input_ids: list[int]
    labels: list[int]


@lru_cache(maxsize=8)
def control_tokens(tokenizer: Any) -> ControlTokens:
    """Returns the control tokens that a tokenizer has as single tokens.

    Raises:
        PlatformError: it has neither ChatML's nor Llama 3's.
    """
    vocabulary = tokenizer.get_vocab()
    for tokens in (LLAMA3, CHATML):
        if tokens.role_start in vocabulary and tokens.end_token in vocabulary:
            return tokens
    raise PlatformError(
        f"The tokenizer of {tokenizer.name_or_path or 'the base model'} has neither <|im_start|> and <|im_end|> nor "
        "<|start_header_id|> and <|eot_id|>; choose a base model of the Llama 3 or ChatML family."
    )


def chat_template(tokens: ControlTokens = CHATML, word_start: str = "") -> str:
    """Returns the Jinja source of the chat template with these control tokens in its first line.

    Args:
        tokens: what stands around a turn.
        word_start: ``WORD_START`` for a tokenizer whose decoder knows of it, otherwise empty.
    """
    _, _, rest = TEMPLATE_FILE.read_text().partition("\n")
    values = ", ".join("'" + value.replace("\n", "\\n") + "'" for value in (*tokens, word_start))
    return f"{{%- set document_start, role_start, role_end, turn_end, word_start = {values} %}}\n{rest}"


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the messages as the server hands them to the template: arguments as objects, not as JSON text.

    Raises:
        PlatformError: the arguments of a call are not a JSON object.
    """
    prepared = []
    for message in messages:
        message = dict(message)
        calls = message.pop("tool_calls", None)
        if calls:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}} for call in calls
            ]
        prepared.append(message)
    return prepared


def render_text(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Returns the conversation as text, through the tokenizer's own chat template."""
    text: str = tokenizer.apply_chat_template(
        prepare_messages(messages),
        tools=list(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return text


def render(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, tokenizer: Any
) -> Rendered:
    """Renders a conversation to token ids, with labels on what the assistant says.

    Every assistant turn is preceded by exactly the tokens that the server computes for the messages before it with
    ``add_generation_prompt``.

    Args:
        messages: OpenAI's chat format; arguments of calls as JSON text or objects.
        tools: OpenAI's format, or None.
        tokenizer: a Hugging Face tokenizer that carries our chat template.

    Raises:
        PlatformError: no assistant turn, or a turn that the server would tokenize differently.
    """
    prepared = prepare_messages(messages)
    turns = [index for index, message in enumerate(prepared) if message["role"] == "assistant"]
    if not turns:
        raise PlatformError("An example has no assistant message, so nothing can be learned from it.")
    end_id = tokenizer.convert_tokens_to_ids(control_tokens(tokenizer).end_token)
    ids = _encode(render_text(prepared, tools, tokenizer), tokenizer)
    labels = [IGNORED] * len(ids)
    for turn in turns:
        prompt = _encode(render_text(prepared[:turn], tools, tokenizer, add_generation_prompt=True), tokenizer)
        start = len(prompt)
        if ids[:start] != prompt or end_id not in ids[start:]:
            raise PlatformError(
                f"The server would tokenize messages[{turn}] differently from training: {prepared[turn]!r}."
            )
        stop = ids.index(end_id, start) + 1
        labels[start:stop] = ids[start:stop]
    return Rendered(ids, labels)


def _encode(text: str, tokenizer: Any) -> list[int]:
    """Returns ``tokenizer.encode(text)``, computed turn by turn.

    Control tokens are cut out of the text before anything else, so what stands between two of them is encoded by
    itself; the system message, the same in many examples, is then encoded once.
    """
    tokens = control_tokens(tokenizer)
    cut = re.compile("|".join(re.escape(token) for token in (tokens.role_start, tokens.end_token)))
    ends = [match.end() for match in cut.finditer(text)]
    spans = pairwise(dict.fromkeys((0, *ends, len(text))))
    return [token for start, end in spans for token in _encode_span(text[start:end], tokenizer)]


@lru_cache(maxsize=4096)
def _encode_span(span: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer.encode(span, add_special_tokens=False))


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments") or {}
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise PlatformError(f"The arguments of a call of {function.get('name')} are not a JSON object: {arguments!r}.")
    return parsed
