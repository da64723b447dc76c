"""A teacher over HTTP that is right on 85 % of the rows and knows how sure it is.

`python -m benchmarks.noisy_teacher GOLD.json` serves chat completions on a free port of 127.0.0.1,
which it prints, until standard input ends. GOLD.json maps each text to its gold class. The answer
to a text is always the same. Its confidence c is drawn so that its mean is 0.85, and it is the gold
class with probability c: the probabilities that the answer comes with are calibrated.
"""

import asyncio
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.slow_endpoint import response, until_stdin_ends

RIGHT = 0.85

ALTERNATIVES = 20
"""The most classes that an answer's probabilities name, as at OpenAI and Azure."""


class NoisyTeacher:
    """What the teacher says of each text."""

    def __init__(self, gold: dict[str, str]) -> None:
        self.gold = gold
        self.classes = sorted(set(gold.values()))

    def probabilities(self, text: str) -> dict[str, float]:
        """Return the probability of each class, the answer's first."""
        draw = random.Random(text)
        # A beta distribution with mean RIGHT between 1 / 3 and 1.
        confidence = 1 / 3 + 2 / 3 * draw.betavariate(3.1, 0.9)
        others = [name for name in self.classes if name != self.gold[text]]
        draw.shuffle(others)
        answer, runner_up = self.gold[text], others[0]
        if draw.random() > confidence:
            answer, runner_up = others[0], self.gold[text]
        # Most of what is left goes to one other class, and the gold class is never far behind.
        rest = [name for name in self.classes if name not in (answer, runner_up)]
        found = {answer: confidence, runner_up: 0.8 * (1 - confidence)}
        for name in rest:
            found[name] = 0.2 * (1 - confidence) / len(rest)
        return found

    def answer(self, body: bytes) -> bytes:
        """Return the response to a chat request whose last message is a text."""
        asked = json.loads(body)
        found = self.probabilities(asked["messages"][-1]["content"])
        answer = next(iter(found))
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": answer, "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
        if asked.get("logprobs"):
            top = [
                {"token": name, "logprob": math.log(share), "bytes": list(name.encode())}
                for name, share in list(found.items())[:ALTERNATIVES]
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
        usage = {"prompt_tokens": 60, "completion_tokens": 3, "total_tokens": 63}
        return response(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "noisy-teacher",
                "choices": [choice],
                "usage": usage,
            }
        )

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of a connection, one after another."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.decode("latin-1").lower().splitlines():
                    if line.startswith("content-length:"):
                        length = int(line.partition(":")[2])
                writer.write(self.answer(await reader.readexactly(length)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def serve(teacher: NoisyTeacher) -> None:
    await until_stdin_ends(await asyncio.start_server(teacher.connected, "127.0.0.1", 0))


if __name__ == "__main__":
    asyncio.run(serve(NoisyTeacher(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
