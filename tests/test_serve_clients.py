"""OpenAI's own client against the server, as its users call it, synchronous and asynchronous."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from serving import Served, shared_server

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def server() -> Served:
    return shared_server("--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_completions(client: openai.OpenAI):
    options = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    answer = client.completions.create(**options, logprobs=1, echo=True)
    assert answer.choices[0].text.startswith("The capital of France is") and answer.usage.completion_tokens <= 6
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    text = client.completions.create(**options).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == text


def test_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].message.content == "2 + 3 = 5." and answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens


def test_chat_streams(client: openai.OpenAI):
    options = {"model": "demo", "messages": MESSAGES, "temperature": 0, "stream": True}
    chunks = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "2 + 3 = 5."
    assert chunks[-1].usage.completion_tokens == 9
    with client.chat.completions.stream(model="demo", messages=MESSAGES, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == "2 + 3 = 5."


def test_tools(client: openai.OpenAI):
    options = {"model": "demo", "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
               "tools": TOOLS, "temperature": 0}  # fmt: skip
    call = client.chat.completions.create(**options).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(streamed.function.arguments) == {"city": "Paris"} and streamed.function.name == "get_weather"


def test_reasoning(client: openai.OpenAI):
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(model="demo", messages=MESSAGES, extra_body=extra).choices[0].message
    assert message.reasoning == message.reasoning_content != ""


def test_structured_output(client: openai.OpenAI):
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [5, 6]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, response_format=form)
    assert json.loads(answer.choices[0].message.content)["sum"] in (5, 6)


def test_errors_have_the_classes_of_their_status(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as found:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "word " * 3000}])
    assert found.value.status_code == 400 and found.value.param == "input_tokens"
    guarded = shared_server("--api-key", "secret")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret").models.list().data


def test_the_asynchronous_client_runs_many_at_once(server: Served):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(number: int) -> str:
                messages = [{"role": "user", "content": f"What is {number} + 1?"}]
                stream = await client.chat.completions.create(
                    model="demo", messages=messages, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            together = await asyncio.gather(*(ask(number) for number in range(12)))
            assert together == [await ask(number) for number in range(12)]
            assert len(set(together)) > 6

    asyncio.run(main())
