"""What programs do with OpenAI's own client. Arguments: address, model. Prints what they get as JSON."""

import asyncio
import json
import sys

import openai

address, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
found = {"models": [one.id for one in client.models.list()]}

vectors = client.embeddings.create(model=model, input=["one", "two"])
found["vectors"] = [one.embedding for one in vectors.data]
vectors = client.embeddings.create(model=model, input="one", encoding_format="float", user="me")
found["vector"] = vectors.data[0].embedding

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "the sea?"}]}
plain = {"model": model, "temperature": 0, "max_tokens": 12}
found["answer"] = client.chat.completions.create(messages=[SYSTEM, QUESTION], **plain).choices[0].message.content
neutral = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "metadata": {}, "n": 1,
    "parallel_tool_calls": True, "response_format": {"type": "text"}, "service_tier": "auto", "stop": None,
    "store": False, "tool_choice": "none", "tools": [], "user": "me",
}  # fmt: skip
again = client.chat.completions.create(messages=[{**SYSTEM, "role": "developer"}, QUESTION], **plain, **neutral)
found["answer_with_neutral_fields"] = again.choices[0].message.content
more = [SYSTEM, QUESTION, again.choices[0].message, {"role": "user", "content": "More?"}]
found["second_answer"] = client.chat.completions.create(messages=more, **plain).choices[0].message.content
prefilled = [QUESTION, {"role": "assistant", "content": "The sea is"}]
found["prefilled"] = client.chat.completions.create(messages=prefilled, **plain).choices[0].message.content
events = client.chat.completions.create(
    messages=[QUESTION], stream=True, stream_options={"include_usage": True}, **plain
)
found["streamed"] = "".join(choice.delta.content or "" for event in events for choice in event.choices)
found["completion"] = client.completions.create(prompt="Once", **plain).choices[0].text


async def at_once():
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as several:
        asked = [several.chat.completions.create(messages=[QUESTION], **plain) for _ in range(3)]
        return [one.choices[0].message.content for one in await asyncio.gather(*asked)]


found["at_once"] = asyncio.run(at_once())
found["refused"] = []
tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}
for more in (
    {"messages": [QUESTION], "tools": [tool]},
    {"messages": [QUESTION], "response_format": {"type": "json_object"}},
    {"messages": [image]},
    {"messages": [QUESTION], "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
):
    try:
        client.chat.completions.create(**plain, **more)
    except openai.BadRequestError as error:
        found["refused"].append([error.param, error.body["message"]])
print(json.dumps(found))
