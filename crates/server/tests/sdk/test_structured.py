"""Structured output by the official OpenAI Python SDK."""

import json
import re
from typing import Literal

import openai
import pydantic
import pytest

from conftest import SUM, VAGUE


class Answer(pydantic.BaseModel):
    kind: Literal["sum", "product"]
    result: int
    steps: list[bool]


def ask(client, messages=SUM, **parameters):
    # Ends what a small model would go on with for ever.
    return client.chat.completions.create(
        model="abacus", messages=messages, **{"temperature": 0, "max_tokens": 400, **parameters}
    )


SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"left": {"type": "integer", "maximum": 999}, "right": {"enum": [286, 287]}},
            "required": ["left", "right"],
            "additionalProperties": False,
        },
    },
}


def test_parse_gives_an_object_of_the_class_behind_the_reasoning(client):
    reply = client.chat.completions.parse(
        model="abacus", messages=SUM, response_format=Answer, temperature=0, max_tokens=400
    )
    message = reply.choices[0].message
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(message.parsed, Answer)
    assert "633" in message.model_extra["reasoning_content"], "the grammar begins behind the thinking"


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_sample_keeps_to_the_schema(client, thinking, seed):
    extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
    reply = ask(client, VAGUE, response_format=SCHEMA, temperature=1.5, seed=seed, n=2, extra_body=extra)
    for choice in reply.choices:
        if choice.finish_reason == "length":
            continue
        value = json.loads(choice.message.content)
        assert set(value) == {"left", "right"} and value["right"] in (286, 287) and value["left"] <= 999


def test_a_stream_joins_to_the_plain_reply(client):
    plain = ask(client, response_format=SCHEMA).choices[0]
    chunks = ask(client, response_format=SCHEMA, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.message.content and json.loads(text)


def test_the_stream_helper_parses(client):
    with client.chat.completions.stream(
        model="abacus", messages=SUM, response_format=Answer, temperature=0, max_tokens=400
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_json_object_is_an_object(client):
    reply = ask(client, VAGUE, response_format={"type": "json_object"})
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    else:
        assert reply.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    "outputs, pattern",
    [
        ({"regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
        ({"grammar": 'start: "x" "y"*'}, "xy*"),
    ],
)
def test_the_forms_of_structured_outputs(client, outputs, pattern):
    for thinking in (False, True):
        extra = {"structured_outputs": outputs, "chat_template_kwargs": {"enable_thinking": thinking}}
        choice = ask(client, extra_body=extra).choices[0]
        if choice.finish_reason == "stop":
            assert re.fullmatch(pattern, choice.message.content)
        else:
            assert pattern == "xy*" and set(choice.message.content) == {"x", "y"}
    prompt = {"model": "abacus", "prompt": "hm", "max_tokens": 60, "extra_body": {"structured_outputs": outputs}}
    choice = client.completions.create(**prompt).choices[0]
    assert choice.finish_reason == "length" or re.fullmatch(pattern, choice.text)


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"$ref": "https://example.com/x.json"}, {"pattern": "(("}])
def test_a_bad_schema_is_refused_by_the_fields_name(client, schema):
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            ask(client, response_format=response_format, stream=stream)
        assert raised.value.body["param"].startswith("response_format")
