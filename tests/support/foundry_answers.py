"""Ask a model that is registered in Foundry Local, with the Python of .venv-foundry:
python foundry_answers.py NAME:VERSION APP.

Reads a JSON list of conversations from stdin, each a list of messages with role and content, and
writes a JSON list with what the model says to each: `text`, of one token, the likeliest, and
`prompt_tokens`.
"""

import json
import sys

from foundry_local_sdk import (
    CatalogType,
    ChatSession,
    Configuration,
    FoundryLocalManager,
    MessageItem,
    MessageRole,
    Request,
    RequestOptions,
    SearchOptions,
)

GREEDY = RequestOptions(search=SearchOptions(do_sample=False, max_output_tokens=1))


def main(model_id: str, app: str) -> None:
    answers = []
    settings = Configuration(app, disable_nonessential_telemetry=True)
    with FoundryLocalManager(settings) as manager:
        model = manager.get_catalog(CatalogType.LOCAL).get_model_variant(model_id)
        model.load()
        for messages in json.load(sys.stdin):
            # A session is one conversation.
            with ChatSession(model) as session, Request() as request:
                session.set_options(GREEDY)
                for message in messages:
                    role = MessageRole[message["role"].upper()]
                    request.add_item(MessageItem(role, message["content"]))
                with session.process_request(request) as response:
                    text = response.get_item(0).get_simple_text()
                    tokens = response.get_usage().prompt_tokens
                    answers.append({"text": text, "prompt_tokens": tokens})
        model.unload()
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
