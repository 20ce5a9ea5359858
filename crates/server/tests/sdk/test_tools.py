"""Tools by the official OpenAI Python SDK: the bundled model calls a calculator."""

import json

import openai
import pytest

from conftest import CALCULATOR, PRODUCT, PRODUCT_CALL, SUM


def ask(client, messages=PRODUCT, **parameters):
    parameters = {"temperature": 0, "tools": [CALCULATOR], "max_tokens": 200, **parameters}
    return client.chat.completions.create(model="abacus", messages=messages, **parameters)


def accumulated(stream):
    """Calls by index, and the finish reason, joined as the SDK's users do it."""
    calls, content, finish = {}, "", None
    for chunk in stream:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            if part.index not in calls:
                assert part.index == len(calls), "indices are dense"
                assert part.id and part.type == "function" and part.function.name and part.function.arguments == ""
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            else:
                assert part.id is None and part.function.name is None, "repeats would be concatenated"
            calls[part.index]["arguments"] += part.function.arguments
        finish = choice.finish_reason or finish
    return calls, content, finish


def test_a_call_whole(client):
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "calculator"
    assert json.loads(call.function.arguments) == PRODUCT_CALL
    assert not choice.message.content


def test_a_call_streamed(client):
    calls, content, finish = accumulated(ask(client, stream=True))
    assert finish == "tool_calls" and not content.strip()
    assert calls[0]["name"] == "calculator" and json.loads(calls[0]["arguments"]) == PRODUCT_CALL


def test_the_stream_helper_accumulates_calls(client):
    with client.chat.completions.stream(
        model="abacus", messages=PRODUCT, tools=[CALCULATOR], temperature=0, max_tokens=200
    ) as stream:
        events = [event for event in stream]
        message = stream.get_final_completion().choices[0].message
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [event.name for event in done] == ["calculator"]
    assert json.loads(message.tool_calls[0].function.arguments) == PRODUCT_CALL


def test_the_result_comes_back_in_the_answer(client):
    message = ask(client).choices[0].message
    assistant = message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "359465724"}
    choice = ask(client, [*PRODUCT, assistant, result]).choices[0]
    assert choice.finish_reason == "stop" and "359465724" in choice.message.content


def test_no_call_where_none_is_needed_or_allowed(client):
    choice = ask(client, SUM).choices[0]
    assert choice.finish_reason == "stop" and not choice.message.tool_calls and "633" in choice.message.content
    choice = ask(client, tool_choice="none").choices[0]
    assert not choice.message.tool_calls and choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "calculator"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_forced(client, choice, stream):
    strict = {"type": "function", "function": {**CALCULATOR["function"], "strict": True}}
    parameters = {"tool_choice": choice, "tools": [strict], "max_tokens": 300, "parallel_tool_calls": False}
    if stream:
        calls, _, finish = accumulated(ask(client, SUM, stream=True, **parameters))
        arguments = calls[0]["arguments"]
    else:
        reply = ask(client, SUM, **parameters).choices[0]
        finish, (call,) = reply.finish_reason, reply.message.tool_calls
        arguments = call.function.arguments
    if finish == "length":
        return
    assert set(json.loads(arguments)) == {"expression"}
    assert finish in ("tool_calls", "stop")


@pytest.mark.parametrize(
    "parameters, param",
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [CALCULATOR, CALCULATOR]}, "tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_bad_tools_are_refused_by_name(client, parameters, param):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **parameters)
    assert raised.value.body["param"].startswith(param)
