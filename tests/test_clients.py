"""The clients people use work against the server: the SDKs of OpenAI and Anthropic, waiting and asynchronous."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field
from serving import Served, parsing_server, served

SUM: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
ASK_WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
OPENAI_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": False}
ANTHROPIC_TOOL: Any = {"name": "get_weather", "input_schema": PARAMETERS}
THINK: Any = {"chat_template_kwargs": {"enable_thinking": True}}
GREEDY: Any = {"temperature": 0}  # not every version of Anthropic's client has the parameter


class Sum(BaseModel):
    result: int = Field(ge=0, le=99)  # a small model would write digits without end


@pytest.fixture(scope="module")
def server() -> Served:
    return parsing_server()


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)


def with_openai(server: Served, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return await use(client)

    return asyncio.run(main())


def with_anthropic(server: Served, use: Callable[[anthropic.AsyncAnthropic], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client:
            return await use(client)

    return asyncio.run(main())


# -- OpenAI: models, completions, chat ---------------------------------------------------------------------------------


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["demo"]


def test_completions(client: openai.OpenAI):
    done = client.completions.create(
        model="demo", prompt=["1, 2, 3,", "a b c"], max_tokens=4, temperature=0, logprobs=2
    )
    assert [choice.index for choice in done.choices] == [0, 1]
    assert all(choice.logprobs and len(choice.logprobs.tokens) == 4 for choice in done.choices)
    chunks = client.completions.create(
        model="demo",
        prompt="1, 2, 3,",
        max_tokens=4,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, last = list(chunks)
    assert "".join(chunk.choices[0].text for chunk in parts) == done.choices[0].text
    assert last.usage is not None and last.usage.completion_tokens == 4


def test_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model="demo", messages=SUM, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.content == "2 + 3 = 5."
    assert choice.finish_reason == "stop"
    assert choice.logprobs and choice.logprobs.content and len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage and answer.usage.completion_tokens == 9


def test_chat_streams(client: openai.OpenAI):
    chunks = list(client.chat.completions.create(model="demo", messages=SUM, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "2 + 3 = 5."
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_streams_through_the_helper(client: openai.OpenAI):
    with client.chat.completions.stream(model="demo", messages=ASK_WEATHER, temperature=0, tools=[TOOL]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls and json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}


def test_a_conversation_with_a_tool(client: openai.OpenAI):
    first = client.chat.completions.create(model="demo", messages=ASK_WEATHER, temperature=0, tools=[TOOL])
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}
    said: Any = [*ASK_WEATHER, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(model="demo", messages=said, temperature=0, tools=[TOOL])
    assert "21" in (second.choices[0].message.content or "")


@pytest.mark.parametrize("prompt", ["Hello!", "What is 2 + 3?", "Tell me about blocks.", "你好"])
def test_a_required_call_always_follows_its_schema(client: openai.OpenAI, prompt: str):
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "unit", "days"],
    }
    tool: Any = {"type": "function", "function": {"name": "forecast", "parameters": schema}}
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": prompt}], tools=[tool], tool_choice="required",
        parallel_tool_calls=False, n=8, temperature=1.5, seed=1, max_tokens=300,
    )  # fmt: skip
    assert len(answer.choices) == 8
    for choice in answer.choices:
        assert choice.message.tool_calls and not choice.message.content, choice
        (call,) = choice.message.tool_calls
        assert call.function.name == "forecast"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"city", "unit", "days"}
        assert len(arguments["city"]) <= 20 and arguments["unit"] in ("celsius", "fahrenheit")
        assert 1 <= arguments["days"] <= 14


def test_reasoning_has_both_names(client: openai.OpenAI):
    answer = client.chat.completions.create(model="demo", messages=SUM, temperature=0, extra_body=THINK)
    message: Any = answer.choices[0].message
    assert message.reasoning and message.reasoning == message.reasoning_content
    assert (message.content or "").strip() == "2 + 3 = 5."
    chunks = client.chat.completions.create(model="demo", messages=SUM, temperature=0, stream=True, extra_body=THINK)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == message.reasoning


def test_structured_output_leaves_the_choice_to_call_a_tool(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "sum", "schema": Sum.model_json_schema()}}
    for question in (SUM, ASK_WEATHER):
        message = client.chat.completions.create(
            model="demo", messages=question, tools=[TOOL], response_format=form, temperature=0, max_tokens=100
        ).choices[0].message  # fmt: skip
        if message.tool_calls:
            assert message.content is None
            assert set(json.loads(message.tool_calls[0].function.arguments)) == {"city"}
        else:
            Sum.model_validate_json(message.content or "")
    assert message.tool_calls, "the model calls the tool when it is asked for the weather"


def test_structured_output_is_parsed(client: openai.OpenAI):
    answer = client.chat.completions.parse(
        model="demo", messages=SUM, response_format=Sum, temperature=0, max_tokens=50
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)
    chosen = client.chat.completions.create(
        model="demo", messages=SUM, temperature=0, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert chosen.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "fields, kind, status",
    [
        ({"temperature": -1}, openai.BadRequestError, 400),
        ({"model": "nope"}, openai.NotFoundError, 404),
        ({"max_tokens": 10**6}, openai.BadRequestError, 400),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError, 400),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            openai.BadRequestError,
            400,
        ),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, openai.BadRequestError, 400),
    ],
)
def test_errors_are_raised_as_their_kind(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], status: int
):
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": "demo", "messages": SUM, **fields})
    assert error.value.status_code == status
    assert isinstance(error.value.body, dict) and error.value.body["message"]


def test_embeddings(client: openai.OpenAI):
    one, two, three = client.embeddings.create(model="demo", input=["a block", "a block", "rain"]).data  # as base64
    assert one.embedding == two.embedding != three.embedding
    assert abs(sum(value * value for value in one.embedding) - 1) < 1e-3
    plain = client.embeddings.create(model="demo", input="a block", encoding_format="float").data[0].embedding
    assert max(abs(a - b) for a, b in zip(plain, one.embedding, strict=True)) < 1e-3


def test_openai_async(server: Served):
    async def use(client: openai.AsyncOpenAI) -> Any:
        async def streamed() -> str:
            chunks = await client.chat.completions.create(model="demo", messages=SUM, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        async def whole() -> str:
            answer = await client.chat.completions.create(model="demo", messages=SUM, temperature=0)
            return answer.choices[0].message.content or ""

        return await asyncio.gather(*(streamed() for _ in range(8)), *(whole() for _ in range(8)))

    assert with_openai(server, use) == ["2 + 3 = 5."] * 16


# -- OpenAI: responses -------------------------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI):
    first = client.responses.create(model="demo", input="What is 2 + 3?", temperature=0)
    assert first.output_text == "2 + 3 = 5." and first.status == "completed"
    assert first.usage and first.usage.total_tokens == 29
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(model="demo", input="And 2 + 4?", previous_response_id=first.id, temperature=0)
    assert second.usage and second.usage.input_tokens > first.usage.total_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_nope")


def test_responses_stream(client: openai.OpenAI):
    with client.responses.stream(
        model="demo", input="What is 2 + 3?", temperature=0, reasoning={"effort": "low"}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text and text.strip() == "2 + 3 = 5."
    assert [item.type for item in final.output] == ["reasoning", "message"]


def test_responses_with_a_tool(client: openai.OpenAI):
    asked: Any = "What is the weather in Paris?"
    first = client.responses.create(model="demo", input=asked, temperature=0, tools=[OPENAI_TOOL])
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21}'}
    second = client.responses.create(
        model="demo", input=[result], previous_response_id=first.id, temperature=0, tools=[OPENAI_TOOL]
    )
    assert "21" in second.output_text
    with client.responses.stream(model="demo", input=asked, temperature=0, tools=[OPENAI_TOOL]) as stream:
        list(stream)
        assert stream.get_final_response().output[0].type == "function_call"


def test_responses_are_parsed(client: openai.OpenAI):
    response = client.responses.parse(
        model="demo", input="What is 2 + 3?", text_format=Sum, temperature=0, max_output_tokens=50
    )
    assert isinstance(response.output_parsed, Sum)


def test_responses_in_the_background(server: Served):
    async def use(client: openai.AsyncOpenAI) -> Any:
        response = await client.responses.create(model="demo", input="What is 2 + 3?", temperature=0, background=True)
        while response.status in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
            response = await client.responses.retrieve(response.id)
        endless = await client.responses.create(
            model="demo", input="Count.", background=True, extra_body={"ignore_eos": True}
        )
        return response.output_text, (await client.responses.cancel(endless.id)).status

    assert with_openai(server, use) == ("2 + 3 = 5.", "cancelled")


# -- Anthropic ---------------------------------------------------------------------------------------------------------


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_messages(claude: anthropic.Anthropic):
    message = claude.messages.create(
        model="demo", max_tokens=100, system="Be short.", messages=SUM, stop_sequences=["never"], extra_body=GREEDY
    )
    assert text_of(message) and message.stop_reason == "end_turn"
    counted = claude.messages.count_tokens(model="demo", system="Be short.", messages=SUM)
    cached = message.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == message.usage.input_tokens + cached


def test_messages_stream(claude: anthropic.Anthropic):
    with claude.messages.stream(model="demo", max_tokens=100, messages=SUM, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        assert text == text_of(stream.get_final_message()) == "2 + 3 = 5."


def test_messages_with_thinking(claude: anthropic.Anthropic):
    with claude.messages.stream(
        model="demo",
        max_tokens=200,
        messages=SUM,
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body=GREEDY,
    ) as stream:
        message = stream.get_final_message()
    thinking, text = message.content
    assert thinking.type == "thinking" and thinking.thinking and thinking.signature
    assert text.type == "text"
    said: Any = [*SUM, {"role": "assistant", "content": message.content}, {"role": "user", "content": "And 2 + 4?"}]
    assert claude.messages.create(model="demo", max_tokens=100, messages=said).content


def test_messages_with_a_tool(claude: anthropic.Anthropic):
    first = claude.messages.create(
        model="demo", max_tokens=200, messages=ASK_WEATHER, tools=[ANTHROPIC_TOOL], extra_body=GREEDY
    )
    (call,) = first.content
    assert first.stop_reason == "tool_use"
    assert call.type == "tool_use" and call.input == {"city": "Paris"}
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 21}'}
    said: Any = [*ASK_WEATHER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(
        model="demo", max_tokens=200, messages=said, tools=[ANTHROPIC_TOOL], extra_body=GREEDY
    )
    assert "21" in text_of(second)
    with claude.messages.stream(
        model="demo", max_tokens=200, messages=ASK_WEATHER, tools=[ANTHROPIC_TOOL], extra_body=GREEDY
    ) as stream:
        (block,) = stream.get_final_message().content
    assert block.type == "tool_use" and block.input == {"city": "Paris"}


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"model": "nope"}, anthropic.NotFoundError),
        ({"max_tokens": 5000}, anthropic.BadRequestError),
        ({"tool_choice": {"type": "tool", "name": "nope"}}, anthropic.BadRequestError),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, anthropic.BadRequestError),
    ],
)
def test_errors_of_messages_are_raised_as_their_kind(claude: anthropic.Anthropic, fields: Any, kind: Any):
    with pytest.raises(kind):
        claude.messages.create(**{"model": "demo", "max_tokens": 10, "messages": SUM, **fields})


def test_anthropic_async(server: Served):
    async def use(client: anthropic.AsyncAnthropic) -> Any:
        async def streamed() -> str:
            async with client.messages.stream(model="demo", max_tokens=100, messages=SUM, extra_body=GREEDY) as stream:
                return "".join([text async for text in stream.text_stream])

        async def whole() -> str:
            return text_of(await client.messages.create(model="demo", max_tokens=100, messages=SUM, extra_body=GREEDY))

        return await asyncio.gather(*(streamed() for _ in range(4)), *(whole() for _ in range(4)))

    assert with_anthropic(server, use) == ["2 + 3 = 5."] * 8


def test_a_wrong_key_is_told_to_both_clients():
    with served("--api-key", "secret") as server:
        base = f"{server.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(
                model="demo", max_tokens=10, messages=SUM
            )
        assert openai.OpenAI(base_url=base, api_key="secret").models.list().data
        claude = anthropic.Anthropic(base_url=server.url, api_key="secret")
        assert claude.messages.create(model="demo", max_tokens=10, messages=SUM).content
