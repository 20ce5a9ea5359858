"""`/v1/responses` by the official OpenAI Python SDK, and the cases of Open Responses as plain checks."""

import json
import time

import openai
import pydantic
import pytest

from conftest import CALCULATOR, PRODUCT, PRODUCT_CALL

QUESTION = "What is 347 + 286?"
TOOL = {"type": "function", **CALCULATOR["function"], "strict": False}


def ask(client, question=QUESTION, **parameters):
    parameters = {"temperature": 0, "max_output_tokens": 300, **parameters}
    return client.responses.create(model="abacus", input=question, **parameters)


def test_a_reply_has_text_reasoning_and_usage(client):
    reply = ask(client)
    assert reply.object == "response" and reply.status == "completed" and reply.error is None
    assert reply.output_text == "347 + 286 = 633."
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens


def streamed(stream):
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    ends = [e for e in events if e.type in ("response.completed", "response.incomplete", "response.failed")]
    assert ends == events[-1:], "exactly one end, last"
    return events


def test_a_stream_keeps_to_the_order_and_joins_to_the_plain_reply(client):
    plain = ask(client)
    events = streamed(ask(client, stream=True))
    final = events[-1].response
    assert final.output_text == plain.output_text
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == plain.output_text
    message = [e.type for e in events if getattr(e, "output_index", None) == 1]
    kinds = list(dict.fromkeys(message))
    assert kinds == [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert final.usage == plain.usage or final.usage.output_tokens == plain.usage.output_tokens


def test_the_stream_helper_accumulates(client):
    with client.responses.stream(model="abacus", input=QUESTION, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == "347 + 286 = 633."


def test_a_length_cut_is_incomplete(client):
    reply = ask(client, max_output_tokens=5)
    assert reply.status == "incomplete" and reply.incomplete_details.reason == "max_output_tokens"
    events = streamed(ask(client, max_output_tokens=5, stream=True))
    assert events[-1].type == "response.incomplete"


class Sum(pydantic.BaseModel):
    left: int
    right: int


def test_parse_gives_an_object_of_the_class(client):
    reply = client.responses.parse(model="abacus", input=QUESTION, text_format=Sum, temperature=0)
    if reply.status == "completed":
        assert isinstance(reply.output_parsed, Sum)


def test_calls_of_tools_whole_streamed_and_their_result(client):
    question = PRODUCT[0]["content"]
    reply = ask(client, question, tools=[TOOL])
    (call,) = [item for item in reply.output if item.type == "function_call"]
    assert call.name == "calculator" and json.loads(call.arguments) == PRODUCT_CALL
    events = streamed(ask(client, question, tools=[TOOL], stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments and json.loads(done.arguments) == PRODUCT_CALL
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "359465724"}
    back = [{"role": "user", "content": question}, call.model_dump(exclude_none=True), result]
    assert "359465724" in ask(client, back, tools=[TOOL]).output_text


def test_system_and_turns(client):
    reply = ask(client, instructions="Answer in capitals.")
    assert "633" in reply.output_text
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Add 71 and 924."}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "71 + 924 = 995.", "annotations": []}]},
        {"role": "user", "content": "minus 49"},
    ]
    assert "946" in ask(client, turns).output_text


def test_a_stored_response_is_found_continued_and_deleted(client):
    first = ask(client, "Add 71 and 924.", store=True)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(first.id)
    assert [item.role for item in items] == ["user"]
    second = ask(client, "minus 49", previous_response_id=first.id)
    assert "946" in second.output_text and second.previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_background_goes_on_without_its_client_and_can_be_cancelled(client):
    reply = ask(client, background=True, store=True)
    assert reply.status in ("queued", "in_progress")
    for _ in range(600):
        reply = client.responses.retrieve(reply.id)
        if reply.status not in ("queued", "in_progress"):
            break
        time.sleep(0.05)
    assert reply.status == "completed" and reply.output_text == "347 + 286 = 633."
    running = ask(client, "hm", background=True, store=True, max_output_tokens=900, temperature=1.9)
    assert client.responses.cancel(running.id).status in ("cancelled", "completed", "incomplete")


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 3},
        {"extra_body": {"temprature": 1}},
        {"tools": [{"type": "web_search"}]},
        {"truncation": "auto"},
        {"previous_response_id": "resp_none"},
    ],
)
def test_what_cannot_be_served_is_refused(client, parameters):
    for stream in (False, True):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
            ask(client, stream=stream, **parameters)
        assert raised.value.body["message"]
