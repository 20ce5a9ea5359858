"""`/v1/messages` by the official Anthropic SDK."""

import json

import anthropic
import pytest

from conftest import KEY, PARAMETERS, PRODUCT, PRODUCT_CALL, SUM

TOOL = {"name": "calculator", "description": "Calculate the value of an expression.", "input_schema": PARAMETERS}


@pytest.fixture(scope="session")
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)


def ask(claude, messages=SUM, **parameters):
    # Without thinking the model's sums are wrong.
    parameters = {"temperature": 0, "max_tokens": 300, "thinking": {"type": "adaptive"}, **parameters}
    # Newer SDKs take newer parameters as keywords only; these go as they are.
    known = {"max_tokens", "system", "tools", "tool_choice", "stop_sequences", "stream", "thinking", "metadata"}
    extra = {name: value for name, value in parameters.items() if name not in known}
    kept = {name: value for name, value in parameters.items() if name in known}
    return claude.messages.create(model="abacus", messages=messages, extra_body=extra, **kept)


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message(claude):
    message = ask(claude)
    assert message.type == "message" and message.role == "assistant" and message.model == "abacus"
    assert text(message) == "347 + 286 = 633." and message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 0 and message.usage.output_tokens > 0


def test_a_stream_joins_to_the_plain_message(claude):
    plain = ask(claude)
    with claude.messages.stream(
        model="abacus", messages=SUM, max_tokens=300, thinking={"type": "adaptive"}, extra_body={"temperature": 0}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert text(final) == text(plain) and final.stop_reason == plain.stop_reason
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert final.usage.output_tokens == plain.usage.output_tokens
    raw = [event.type for event in ask(claude, stream=True) if event.type != "ping"]
    order = list(dict.fromkeys(raw))
    assert order == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert raw.count("content_block_start") == raw.count("content_block_stop")


def test_thinking_is_a_block_of_its_own_when_enabled(claude):
    message = ask(claude, thinking={"type": "enabled", "budget_tokens": 200}, max_tokens=400)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert "633" in message.content[0].thinking
    message = ask(claude, thinking={"type": "disabled"})
    assert [block.type for block in message.content] == ["text"]


def test_the_stop_reasons(claude):
    assert ask(claude, max_tokens=3).stop_reason == "max_tokens"
    message = ask(claude, thinking={"type": "disabled"}, stop_sequences=[" ="])
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == " ="
    assert text(message) == "347 + 286"


def test_tools_whole_streamed_and_their_result(claude):
    message = ask(claude, PRODUCT, tools=[TOOL])
    assert message.stop_reason == "tool_use"
    (use,) = [block for block in message.content if block.type == "tool_use"]
    assert use.name == "calculator" and use.input == PRODUCT_CALL
    with claude.messages.stream(
        model="abacus", messages=PRODUCT, tools=[TOOL], max_tokens=300,
        thinking={"type": "adaptive"}, extra_body={"temperature": 0},
    ) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(parts)) == PRODUCT_CALL and final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "359465724"}
    turns = [
        *PRODUCT,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {"role": "user", "content": [result]},
    ]
    assert "359465724" in text(ask(claude, turns, tools=[TOOL]))


def test_a_call_is_forced(claude):
    message = ask(claude, tools=[TOOL], tool_choice={"type": "tool", "name": "calculator"})
    assert message.stop_reason in ("tool_use", "max_tokens")
    assert any(block.type == "tool_use" for block in message.content)


def test_system_texts(claude):
    for system in ("Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]):
        assert "633" in text(ask(claude, system=system))


def test_counted_tokens_are_those_of_the_message(claude):
    for parameters in ({}, {"tools": [TOOL]}, {"system": "Be brief."}):
        parameters = {"thinking": {"type": "adaptive"}, **parameters}
        counted = claude.messages.count_tokens(model="abacus", messages=SUM, **parameters)
        usage = ask(claude, **parameters).usage
        # What was found in the cache is counted apart.
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    "error, parameters",
    [
        (anthropic.BadRequestError, {"temperature": 3}),
        (anthropic.BadRequestError, {"unheard_of": 1}),
        (anthropic.BadRequestError, {"max_tokens": 5000}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        (anthropic.BadRequestError, {"messages": []}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdks_classes(claude, error, parameters, stream):
    with pytest.raises(error) as raised:
        ask(claude, **{"stream": stream, **parameters})
    body = raised.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"]


def test_other_refusals_have_its_shape_too(claude, url):
    with pytest.raises(anthropic.AuthenticationError) as raised:
        ask(anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0))
    assert raised.value.body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.NotFoundError) as raised:
        claude.messages.create(model="other", messages=SUM, max_tokens=5)
    assert raised.value.body["error"]["type"] == "not_found_error"
