"""Chat, completions and models by the official OpenAI Python SDK."""

import concurrent.futures
import math

import openai
import pytest

from conftest import KEY, SUM, VAGUE


def ask(client, messages=SUM, **parameters):
    return client.chat.completions.create(model="abacus", messages=messages, **{"temperature": 0, **parameters})


def joined(stream):
    """Reasoning, content and the last finish reason of each choice; checks the order of chunks on the way."""
    choices, usage, ids = {}, None, set()
    for chunk in stream:
        ids.add((chunk.id, chunk.created, chunk.model))
        if not chunk.choices:
            assert usage is None, "one usage chunk"
            usage = chunk.usage
        for choice in chunk.choices:
            first = choice.index not in choices
            state = choices.setdefault(choice.index, {"reasoning": "", "content": "", "finish": None})
            assert state["finish"] is None, "nothing after the finish reason"
            assert (choice.delta.role == "assistant") == first, "the role comes once, first"
            extra = choice.delta.model_extra or {}
            reasoning = extra.get("reasoning_content") or ""
            assert reasoning == (extra.get("reasoning") or ""), "both names carry the same"
            content = choice.delta.content or ""
            assert not (reasoning and content), "never both in one delta"
            assert not (reasoning and state["content"]), "reasoning precedes content"
            state["reasoning"] += reasoning
            state["content"] += content
            state["finish"] = choice.finish_reason
    assert len(ids) == 1, "one id, created and model in all chunks"
    return choices, usage


def test_a_reply_has_reasoning_content_finish_reason_and_usage(client):
    reply = ask(client)
    message = reply.choices[0].message
    assert message.content == "347 + 286 = 633."
    assert "633" in message.model_extra["reasoning_content"]
    assert message.model_extra["reasoning"] == message.model_extra["reasoning_content"]
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert reply.model == "abacus" and reply.system_fingerprint and reply.id.startswith("chatcmpl-")


def test_a_stream_joins_to_the_plain_reply(client):
    plain = ask(client)
    choices, usage = joined(ask(client, stream=True, stream_options={"include_usage": True}))
    message = plain.choices[0].message
    assert choices == {
        0: {"reasoning": message.model_extra["reasoning_content"], "content": message.content, "finish": "stop"}
    }
    assert usage.completion_tokens == plain.usage.completion_tokens
    assert usage.prompt_tokens == plain.usage.prompt_tokens


def test_without_include_usage_no_chunk_lacks_choices(client):
    _, usage = joined(ask(client, stream=True))
    assert usage is None


def test_the_sdk_stream_helper_accumulates(client):
    with client.chat.completions.stream(model="abacus", messages=SUM, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "347 + 286 = 633."


def test_thinking_can_be_switched_off(client):
    reply = ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert not (reply.choices[0].message.model_extra or {}).get("reasoning_content")
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0
    assert reply.choices[0].message.content.startswith("347 + 286 =")


def test_a_stop_string_never_shows(client):
    reply = ask(client, stop=["= 6"])
    assert reply.choices[0].finish_reason == "stop"
    text = reply.choices[0].message.content or ""
    assert "= 6" not in text
    whole = ask(client, stop=[" ="], extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert whole.choices[0].message.content == "347 + 286"
    choices, _ = joined(
        ask(client, stop=[" ="], stream=True, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    )
    assert choices[0]["content"] == "347 + 286" and choices[0]["finish"] == "stop"


def test_max_tokens_ends_with_length(client):
    reply = ask(client, max_completion_tokens=5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5


def test_a_seed_repeats_and_another_differs(client):
    def sample(seed):
        return [
            (choice.message.model_extra.get("reasoning_content"), choice.message.content)
            for choice in ask(client, VAGUE, temperature=2.0, seed=seed, n=2, max_tokens=40).choices
        ]

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_n_choices_differ_and_usage_counts_the_prompt_once(client):
    one = ask(client, VAGUE, max_tokens=30)
    reply = ask(client, VAGUE, n=3, temperature=2.0, seed=1, max_tokens=30)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    texts = {(c.message.model_extra.get("reasoning_content"), c.message.content) for c in reply.choices}
    assert len(texts) > 1
    assert reply.usage.prompt_tokens == one.usage.prompt_tokens
    choices, _ = joined(ask(client, VAGUE, n=3, temperature=2.0, seed=1, max_tokens=30, stream=True))
    assert list(choices) == [0, 1, 2], "choices first appear in order"
    for choice in reply.choices:
        state = choices[choice.index]
        assert state["content"] == (choice.message.content or "")
        assert state["reasoning"] == (choice.message.model_extra.get("reasoning_content") or "")


def test_logprobs_are_the_models_own(client):
    plain = ask(client, max_tokens=8, logprobs=True, top_logprobs=3)
    entries = plain.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the most likely"
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert sum(math.exp(t.logprob) for t in entry.top_logprobs) <= 1 + 1e-5
    chunks = list(ask(client, max_tokens=8, logprobs=True, top_logprobs=3, stream=True))
    streamed = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in entries]


def test_completions_text_and_logprobs(client):
    prompt = "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 2?<｜Assistant｜>"
    reply = client.completions.create(model="abacus", prompt=[prompt, prompt], temperature=0, max_tokens=60, logprobs=2)
    assert reply.object == "text_completion" and [c.index for c in reply.choices] == [0, 1]
    first, second = reply.choices
    assert first.text == second.text and "4" in first.text
    assert len(first.logprobs.tokens) == len(first.logprobs.token_logprobs) == len(first.logprobs.text_offset)
    chunks = client.completions.create(model="abacus", prompt=prompt, temperature=0, max_tokens=60, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == first.text


def test_models_are_listed_and_found(client):
    assert [m.id for m in client.models.list()] == ["abacus", "tuned"]
    assert client.models.retrieve("abacus").id == "abacus"
    assert client.models.retrieve("tuned").model_extra["parent"] == "abacus"


def test_an_adapter_chats_under_its_own_name(client):
    def tuned(_):
        reply = client.chat.completions.create(
            model="tuned", messages=SUM, temperature=0, max_tokens=40, logprobs=True, top_logprobs=1)
        return reply, [(e.token, e.logprob) for e in reply.choices[0].logprobs.content]

    reply, alone = tuned(0)
    base = ask(client, max_tokens=40, logprobs=True, top_logprobs=1)
    assert reply.model == "tuned" and reply.system_fingerprint != base.system_fingerprint
    assert alone != [(e.token, e.logprob) for e in base.choices[0].logprobs.content]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        others = pool.map(lambda _: ask(client, max_tokens=40), range(8))
        assert all(scores == alone for _, scores in pool.map(tuned, range(8)))
        assert len({other.system_fingerprint for other in others}) == 1


@pytest.mark.parametrize(
    "error, code, parameters",
    [
        (openai.BadRequestError, "out_of_range", {"temperature": 3}),
        (openai.BadRequestError, "unknown_parameter", {"extra_body": {"temprature": 1}}),
        (openai.BadRequestError, "unsupported_parameter", {"extra_body": {"modalities": ["audio"]}}),
        (openai.BadRequestError, "context_length_exceeded", {"max_tokens": 100000}),
        (openai.BadRequestError, "context_length_exceeded", {"messages": [{"role": "user", "content": "7" * 5000}]}),
        (openai.NotFoundError, "model_not_found", {"model": "other"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdks_classes_also_when_streaming(client, error, code, parameters, stream):
    call = {"model": "abacus", "messages": SUM, "stream": stream, **parameters}
    with pytest.raises(error) as raised:
        client.chat.completions.create(**call)
    assert raised.value.code == code
    assert raised.value.body["message"]


def test_a_wrong_key_is_refused(url):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))


def test_32_concurrent_streams_equal_one_by_one(client):
    questions = [[{"role": "user", "content": f"What is {n * 13 % 700 + 11} + {n * 29 % 500 + 7}?"}] for n in range(32)]

    def streamed(messages):
        return joined(ask(client, messages, stream=True))[0]

    alone = [streamed(q) for q in questions]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = list(pool.map(streamed, questions))
    assert together == alone
    assert all(reply[0]["finish"] == "stop" for reply in alone)
