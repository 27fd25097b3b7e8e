import json
from pathlib import Path
from typing import Any

import pytest

from taskagent_platform.errors import PlatformError
from taskagent_platform.training.template import (
    CALL_TOKENS,
    CHATML,
    IGNORED,
    LLAMA3,
    TEMPLATE_FILE,
    chat_template,
    control_tokens,
    prepare_messages,
    render,
    render_text,
)
from taskagent_platform_tests.training import conversations
from taskagent_platform_tests.training.conversations import KINDS, TOOLS

kinds = pytest.mark.parametrize("messages", KINDS.values(), ids=KINDS.keys())


def test_the_text_is_this(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You control lamps.\n\ntoday 2024-01-15"},
        conversations.user("on"),
        conversations.calls(("set_light", {"room": "hall", "level": 5}), ("list_lights", {})),
        conversations.result({"ok": True}),
        conversations.says("Done."),
    ]
    text = render_text(messages, TOOLS, tokenizer)
    assert text.startswith(
        "<|im_start|>system\nTools (* = required, text unless noted):\n"
        "set_light(room*, level*: integer, color: white|red, until, tags: [string]) - "
    )
    assert text.endswith(
        "}}</tool_call>\n\nYou control lamps.\n\ntoday 2024-01-15<|im_end|>\n"
        "<|im_start|>user\n on<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>{"name": "set_light", "arguments": {"room": " hall", "level": 5}}</tool_call>'
        '<tool_call>{"name": "list_lights", "arguments": {}}</tool_call><|im_end|>\n'
        '<|im_start|>tool\n{"ok": true}<|im_end|>\n'
        "<|im_start|>assistant\nDone.<|im_end|>\n"
    )


def test_what_stands_around_the_names_and_values_of_a_call_is_one_token_each(tokenizer: Any) -> None:
    message = conversations.calls(("set_light", {"room": "the büro", "tags": ["1 b", "c"]}), ("list_lights", {}))
    text = render_text([conversations.user("on"), message], TOOLS, tokenizer).rpartition("assistant\n")[2]
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = [tokenizer.decode([one]) for one in ids]
    assert [token for token in tokens if token in CALL_TOKENS] == [
        '<tool_call>{"name": "', '", "arguments": {', '": "', '", "', '": ["', '", "', "}}</tool_call>",
        '<tool_call>{"name": "', '", "arguments": {', "}}</tool_call>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == (
        '<tool_call>{"name": "set_light", "arguments": {"room": "the büro", "tags": ["1 b", "c"]}}</tool_call>'
        '<tool_call>{"name": "list_lights", "arguments": {}}</tool_call><|im_end|>\n'
    ), "spaces and letters beyond ASCII survive beside them"


@pytest.mark.parametrize(
    "request_", ["tractor lights red", "'tractor' in red", 'red in "tractor", please', "the tractor red"]
)
def test_a_word_is_copied_with_the_tokens_it_is_asked_with(request_: str, tokenizer: Any) -> None:
    arguments = {"room": "tractor", "color": "red", "until": "7pm", "tags": ["tractor"]}
    messages = [conversations.user(request_), conversations.calls(("set_light", arguments))]
    messages += [
        conversations.result({"room": "tractor", "tags": ["tractor"]}),
        conversations.says('The "tractor" is on.'),
    ]
    ids = render(messages, TOOLS, tokenizer).input_ids
    tokens = [tokenizer.decode([one]) for one in ids]
    assert tokens.count(" tractor") == 6
    assert "tract" not in tokens
    assert 'assistant\nThe "tractor" is on.<' in tokenizer.decode(ids)
    values = {tokens[i + 1] for i, token in enumerate(tokens) if token == '": "'}
    assert values == {" tractor", "red", "7"}, "a server's grammar takes a choice from its first letter on"


def test_a_base_model_without_tokens_of_calls_sees_text_as_it_is(tokenizer: Any) -> None:
    messages = [conversations.user("'a' b"), conversations.calls(("set_light", {"room": "hall", "level": 5}))]
    text = tokenizer.apply_chat_template(
        [messages[0], prepare_messages(messages)[1], conversations.result({"room": "hall"})],
        tools=TOOLS,
        chat_template=chat_template(CHATML),
        tokenize=False,
    )
    assert "user\n'a' b<" in text
    assert '{"room": "hall", "level": 5}' in text
    assert '{"room": "hall"}' in text


def test_the_decoder_follows_a_stream(tokenizer: Any) -> None:
    from tokenizers.decoders import DecodeStream

    text = '<tool_call>{"name": "add_lamp", "arguments": {"room": " früh dran", "tags": [" a b", " c"]}}</tool_call>'
    stream = DecodeStream(skip_special_tokens=True)
    pieces = [stream.step(tokenizer.backend_tokenizer, one) for one in tokenizer.encode(text)]
    assert "".join(piece for piece in pieces if piece) == (
        '<tool_call>{"name": "add_lamp", "arguments": {"room": "früh dran", "tags": ["a b", "c"]}}</tool_call>'
    )


def test_static_text_comes_before_what_changes(tokenizer: Any) -> None:
    one, other = (render_text([conversations.system(now)], TOOLS, tokenizer) for now in (0, 1))
    first = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    assert "remove_lamp(" in one[:first]
    assert "Copy the user's words." in one[:first]


@kinds
def test_labels_are_what_the_assistant_says(messages: list[dict[str, Any]], tokenizer: Any) -> None:
    rendered = render(messages, TOOLS, tokenizer)
    learned = tokenizer.decode([label for label in rendered.labels if label != IGNORED])
    turns = learned.split("<|im_end|>")
    assert len(turns) - 1 == sum(message["role"] == "assistant" for message in messages)
    assert turns[-1] == ""
    for turn, message in zip(turns, [m for m in messages if m["role"] == "assistant"], strict=False):
        if calls := message.get("tool_calls"):
            assert turn.count("<tool_call>") == turn.count("</tool_call>") == len(calls)
        else:
            assert turn.replace("< ", "<") == message["content"].strip()
    assert all(label in (IGNORED, token) for label, token in zip(rendered.labels, rendered.input_ids, strict=True))


@kinds
def test_a_turn_follows_the_prompt_of_the_server(messages: list[dict[str, Any]], tokenizer: Any) -> None:
    rendered = render(messages, TOOLS, tokenizer)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            text = render_text(messages[:index], TOOLS, tokenizer, add_generation_prompt=True)
            prompt = tokenizer.encode(text, add_special_tokens=False)
            assert rendered.input_ids[: len(prompt)] == prompt
            assert rendered.labels[len(prompt) - 1] == IGNORED
            assert rendered.labels[len(prompt)] == rendered.input_ids[len(prompt)]


@kinds
def test_data_never_becomes_a_control_token(messages: list[dict[str, Any]], tokenizer: Any) -> None:
    ids = render(messages, TOOLS, tokenizer).input_ids
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    blocks = len(messages) + (messages[0]["role"] != "system")
    assert ids.count(start) == ids.count(end) == blocks
    text = tokenizer.decode(ids)
    made = sum(len(message.get("tool_calls") or []) for message in messages)
    # The system block shows the form of a call once.
    assert text.count("<tool_call>") == text.count("</tool_call>") == made + 1


def test_calls_survive_the_way_to_the_client_and_back(tokenizer: Any) -> None:
    ids = render(KINDS["unicode and quotes"], TOOLS, tokenizer).input_ids
    text = tokenizer.decode(ids)
    call = json.loads(text.rpartition("<tool_call>")[2].partition("</tool_call>")[0])
    assert call == {"name": "add_lamp", "arguments": {"room": 'früh "🌅"', "name": "a\\b\n"}}


def test_llama_3_has_its_own_control_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a <|eot_id|> b"}, {"role": "assistant", "content": "c"}],
        chat_template=chat_template(LLAMA3),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na < |eot_id|> b<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_file_is_the_chatml_template() -> None:
    assert chat_template(CHATML) == TEMPLATE_FILE.read_text()


def test_control_tokens_come_from_the_vocabulary(tokenizer: Any) -> None:
    assert control_tokens(tokenizer) == CHATML

    class Other:
        name_or_path = "some/model"

        def get_vocab(self) -> dict[str, int]:
            return {"<s>": 0}

    with pytest.raises(PlatformError, match=r"some/model has neither"):
        control_tokens(Other())


def test_arguments_that_are_no_object_are_refused(tokenizer: Any) -> None:
    message = conversations.calls(("list_lights", {}))
    message["tool_calls"][0]["function"]["arguments"] = "[1"
    with pytest.raises(PlatformError, match=r"list_lights are not a JSON object"):
        render([conversations.user("x"), message], TOOLS, tokenizer)


def test_an_example_needs_an_assistant(tokenizer: Any) -> None:
    with pytest.raises(PlatformError, match="no assistant message"):
        render([conversations.user("x")], TOOLS, tokenizer)


@pytest.mark.slow
def test_vllm_renders_the_same_tokens(base_folder: Path, tokenizer: Any) -> None:
    """vLLM's own request model, message parser and template renderer give the tokens that were trained on."""
    pytest.importorskip("vllm")
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.hf import HfRenderer

    config = VllmConfig(model_config=ModelConfig(model=str(base_folder), dtype="float32", max_model_len=2048))
    renderer = HfRenderer(config, tokenizer)
    for name, messages in KINDS.items():
        rendered = render(messages, TOOLS, tokenizer)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            request = ChatCompletionRequest.model_validate(
                {"model": "m", "messages": messages[:index], "tools": TOOLS, "temperature": 0}
            )
            tools = [tool.model_dump() for tool in request.tools or []]
            params = request.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
            _, prompt = renderer.render_messages(request.messages, params)
            assert not request.add_special_tokens
            ids = tokenizer.encode(prompt["prompt"], add_special_tokens=False)
            assert ids == rendered.input_ids[: len(ids)], name
            assert rendered.labels[len(ids) - 1] == IGNORED, name
            assert rendered.labels[len(ids)] != IGNORED, name


@pytest.mark.slow
def test_vllm_parses_what_was_trained(base_folder: Path, tokenizer: Any) -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    parser = Hermes2ProToolParser(tokenizer)
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [conversations.user("x")]})
    for messages in KINDS.values():
        rendered = render(messages, TOOLS, tokenizer)
        learned = tokenizer.decode([label for label in rendered.labels if label != IGNORED]).split("<|im_end|>")
        for turn, message in zip(learned, [m for m in messages if m["role"] == "assistant"], strict=False):
            found = parser.extract_tool_calls(turn, request)
            expected = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls") or []]
            got = [json.loads(call.function.arguments.replace("< ", "<")) for call in found.tool_calls]
            assert got == expected
            if not expected:
                assert found.content == turn


@pytest.mark.slow
def test_the_grammar_that_the_server_enforces_takes_what_was_trained(tokenizer: Any) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag

    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    tag = get_model_structural_tag("hermes", [ChatCompletionToolsParam(**tool) for tool in strict], "auto", False)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    grammar = xgrammar.GrammarCompiler(info).compile_structural_tag(tag)

    def taken(tokens: list[int]) -> bool:
        matcher = xgrammar.GrammarMatcher(grammar)
        return all(matcher.accept_token(token) for token in tokens)

    turns = 0
    for name, messages in KINDS.items():
        rendered = render(messages, TOOLS, tokenizer)
        learned = [token for token in rendered.labels if token != IGNORED]
        turn: list[int] = []
        for token in learned:
            turn.append(token)
            if token == tokenizer.eos_token_id:
                assert taken(turn), name
                turns += 1
                turn = []
    assert turns > len(KINDS)
    assert not taken(tokenizer.encode('<tool_call>{"name": "sing", "arguments": {}}</tool_call>'))
