"""What programs do with langchain. Arguments: address, model, tokens as hex of their bytes in the order of their ids.

Prints what they get as JSON.
"""

import json
import sys

import tiktoken
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

address, model, tokens = sys.argv[1:]
to = {"base_url": f"{address}/v1", "api_key": "none", "model": model, "max_retries": 0}
found = {}

texts = OpenAIEmbeddings(**to, check_embedding_ctx_length=False)
found["vectors"] = texts.embed_documents(["one", "two"])
found["vector"] = texts.embed_query("one")

# By default it sends token ids, which tiktoken makes: they are right where they are those of the model.
ranks = {bytes.fromhex(token): place for place, token in enumerate(tokens.split(","))}
own = tiktoken.Encoding("own", pat_str=r"(?s:.)", mergeable_ranks=ranks, special_tokens={})
tiktoken.encoding_for_model = lambda name: own
found["vectors_by_token_ids"] = OpenAIEmbeddings(**to).embed_documents(["one", "two"])

chat = ChatOpenAI(**to, temperature=0, max_tokens=12)
conversation = [SystemMessage("Be brief."), HumanMessage("What is the sea?")]
found["answer"] = chat.invoke(conversation).content
found["second_answer"] = chat.invoke([*conversation, AIMessage(found["answer"]), HumanMessage("More?")]).content
found["streamed"] = "".join(piece.content for piece in chat.stream(conversation))
found["at_once"] = [one.content for one in chat.batch([conversation] * 3)]
found["completion"] = OpenAI(**to, temperature=0, max_tokens=12).invoke("Once")
print(json.dumps(found))
