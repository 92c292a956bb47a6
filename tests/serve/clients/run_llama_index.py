"""What programs do with LlamaIndex. Arguments: address, model. Prints what they get as JSON."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

address, model = sys.argv[1:]
to = {"api_base": f"{address}/v1", "api_key": "none", "max_retries": 0}
found = {}

texts = OpenAILikeEmbedding(model_name=model, **to)
found["vectors"] = texts.get_text_embedding_batch(["one", "two"])
found["vector"] = texts.get_query_embedding("one")

chat = OpenAILike(model=model, is_chat_model=True, temperature=0, max_tokens=12, context_window=1024, **to)
conversation = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="What is the sea?")]
found["answer"] = chat.chat(conversation).message.content
more = [
    *conversation,
    ChatMessage(role="assistant", content=found["answer"]),
    ChatMessage(role="user", content="More?"),
]
found["second_answer"] = chat.chat(more).message.content
found["streamed"] = "".join(piece.delta or "" for piece in chat.stream_chat(conversation))
plain = OpenAILike(model=model, is_chat_model=False, temperature=0, max_tokens=12, context_window=1024, **to)
found["completion"] = plain.complete("Once").text
print(json.dumps(found))
