"""LiteLLM, LangChain, Instructor and the OpenAI Agents SDK, each doing what it is used for."""

import asyncio
import json
import os

import pydantic
import pytest

from conftest import CALCULATOR, KEY, PRODUCT, PRODUCT_CALL, SUM

# Nothing goes anywhere but to the server.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

ANSWER = "347 + 286 = 633."


class Sum(pydantic.BaseModel):
    """The two numbers of a sum; bounded and closed, as a small model may write digits and members without end."""

    model_config = pydantic.ConfigDict(extra="forbid")
    left: int = pydantic.Field(ge=0, le=999)
    right: int = pydantic.Field(ge=0, le=999)


class TestLiteLlm:
    @pytest.fixture(scope="class")
    def ask(self, url):
        import litellm

        def ask(messages=SUM, **parameters):
            parameters = {"temperature": 0, "max_tokens": 200, **parameters}
            return litellm.completion(
                model="hosted_vllm/abacus", api_base=f"{url}/v1", api_key=KEY, messages=messages, **parameters
            )

        return ask

    def test_whole_and_streamed(self, ask):
        message = ask().choices[0].message
        assert message.content == ANSWER and "633" in message.reasoning_content
        chunks = list(ask(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        assert chunks[-1].choices[0].finish_reason == "stop"

    def test_tools(self, ask):
        (call,) = ask(PRODUCT, tools=[CALCULATOR]).choices[0].message.tool_calls
        assert call.function.name == "calculator" and json.loads(call.function.arguments) == PRODUCT_CALL
        import litellm

        rebuilt = litellm.stream_chunk_builder(list(ask(PRODUCT, tools=[CALCULATOR], stream=True)))
        (call,) = rebuilt.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == PRODUCT_CALL and call.function.name == "calculator"

    def test_structured_output(self, ask):
        choice = ask(response_format=Sum, max_tokens=400).choices[0]
        assert choice.finish_reason == "length" or Sum.model_validate_json(choice.message.content)

    def test_errors_are_its_classes(self, ask):
        import litellm

        with pytest.raises(litellm.BadRequestError):
            ask(temperature=3)
        with pytest.raises(litellm.ContextWindowExceededError):
            ask([{"role": "user", "content": "7" * 5000}])

    def test_completions(self, url):
        import litellm

        reply = litellm.text_completion(
            model="text-completion-openai/abacus", api_base=f"{url}/v1", api_key=KEY, prompt="hm", max_tokens=5
        )
        assert reply.choices[0].text and reply.usage.completion_tokens == 5


class TestLangChain:
    @pytest.fixture(scope="class")
    def model(self, url):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model="abacus", base_url=f"{url}/v1", api_key=KEY, temperature=0, max_tokens=400)

    def test_whole_streamed_and_batched(self, model):
        message = model.invoke("What is 347 + 286?")
        assert message.content == ANSWER and message.usage_metadata["output_tokens"] > 0
        assert "".join(chunk.content for chunk in model.stream("What is 347 + 286?")) == ANSWER
        assert [m.content for m in model.batch(["What is 347 + 286?"] * 3)] == [ANSWER] * 3

    def test_tools_and_their_result(self, model):
        from langchain_core.messages import HumanMessage, ToolMessage

        bound = model.bind_tools([CALCULATOR])
        turns = [HumanMessage(PRODUCT[0]["content"])]
        message = bound.invoke(turns)
        (call,) = message.tool_calls
        assert call["name"] == "calculator" and call["args"] == PRODUCT_CALL
        gathered = None
        for chunk in bound.stream(turns):
            gathered = chunk if gathered is None else gathered + chunk
        assert gathered.tool_calls[0]["args"] == PRODUCT_CALL
        turns += [message, ToolMessage("359465724", tool_call_id=call["id"])]
        assert "359465724" in bound.invoke(turns).content

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_structured_output(self, model, method):
        found = model.with_structured_output(Sum, method=method, include_raw=True).invoke("What is 347 + 286?")
        cut = found["raw"].response_metadata["finish_reason"] == "length"
        assert cut or isinstance(found["parsed"], Sum), found

    def test_responses(self, model):
        message = model.model_copy(update={"use_responses_api": True}).invoke("What is 347 + 286?")
        assert message.text.strip() == ANSWER

    def test_embeddings(self, url):
        from langchain_openai import OpenAIEmbeddings

        embeddings = OpenAIEmbeddings(
            model="abacus", base_url=f"{url}/v1", api_key=KEY, check_embedding_ctx_length=False
        )
        one, other = embeddings.embed_documents(["one", "two words"])
        assert len(one) == len(other) > 0 and one != other


class TestInstructor:
    @pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
    def test_an_object_of_the_class(self, url, mode):
        import instructor
        import openai

        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        client = instructor.from_openai(client, mode=instructor.Mode[mode])
        found = client.chat.completions.create(
            model="abacus", messages=SUM, response_model=Sum, temperature=0, max_retries=2, max_tokens=600
        )
        assert isinstance(found, Sum)


class TestAgents:
    # A client belongs to its event loop, and each test has one of its own.
    @pytest.fixture(params=["chat", "responses"])
    def agent(self, url, request):
        import agents
        import openai

        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        kinds = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
        model = kinds[request.param](model="abacus", openai_client=client)

        @agents.function_tool(strict_mode=False)
        def calculator(expression: str) -> str:
            """Calculate the value of an expression."""
            left, right = expression.split("*")
            return str(int(left) * int(right))

        settings = agents.ModelSettings(temperature=0, max_tokens=300)
        return agents.Agent(name="sums", model=model, tools=[calculator], model_settings=settings)

    def test_a_tool_is_called_and_its_result_told(self, agent):
        import agents

        result = asyncio.run(agents.Runner.run(agent, PRODUCT[0]["content"]))
        assert "359465724" in result.final_output

    def test_streamed(self, agent):
        import agents

        async def run():
            result = agents.Runner.run_streamed(agent, PRODUCT[0]["content"])
            kinds = [event.type async for event in result.stream_events()]
            return result.final_output, kinds

        output, kinds = asyncio.run(run())
        assert "359465724" in output and "raw_response_event" in kinds and "run_item_stream_event" in kinds
