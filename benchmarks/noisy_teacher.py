"""A teacher over HTTP that is right on 85 % of the rows and knows how sure it is.

`python -m benchmarks.noisy_teacher GOLD.json [NAME RIGHT]` serves chat completions on a free port
of 127.0.0.1, which it prints, until standard input ends. GOLD.json maps each text to its gold
class. A request's last message is the text alone. The answer to a text is always the same.

The teacher is as sure of its answer, c, as it is right: c is drawn from 0.5 to 1 with a mean of
0.85, the other classes share 1 - c, and the gold class is each class with that class's probability.
So the errors are at random: another teacher's may depend on the text.

With NAME, RIGHT is the mean of c, and most texts are either easy or hard. Teachers of other names
err otherwise, but a text that is hard for one of them is mostly hard for the others: the quantiles
of c are those of normal variables with a correlation of 0.5.
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

LEAST = 0.5
"""The least probability of an answer, so that no other class is likelier."""

SHARED = 0.5
"""The correlation of how hard a text is for two teachers with names."""

ALTERNATIVES = 20
"""The most classes that an answer's probabilities name, as at OpenAI and Azure."""


class NoisyTeacher:
    """What the teacher says of each text."""

    def __init__(self, gold: dict[str, str], name: str = "", right: float = RIGHT) -> None:
        self.gold = {text.strip(): name for text, name in gold.items()}
        self.classes = sorted(set(gold.values()))
        self.name = name
        self.mean = (right - LEAST) / (1 - LEAST)

    def confidence(self, text: str, draw: random.Random) -> float:
        """Return the probability of the answer to a text; `draw` is the text's own."""
        if self.name:
            from scipy.stats import beta, norm

            shared = random.Random(text.strip()).gauss()
            own = random.Random(f"{self.name}: {text.strip()}").gauss()
            quantile = norm.cdf(math.sqrt(SHARED) * shared + math.sqrt(1 - SHARED) * own)
            found = float(beta.ppf(quantile, self.mean, 1 - self.mean))
        else:
            found = draw.betavariate(3 * self.mean, 3 * (1 - self.mean))
        # A probability of 1 would leave the others none.
        return LEAST + (1 - LEAST) * min(found, 0.999)

    def probabilities(self, text: str) -> dict[str, float]:
        """Return the probability of each class, the highest first, which is the answer's. Raises
        KeyError for a text without a gold class."""
        gold = self.gold[text.strip()]
        draw = random.Random(self.name + text.strip())
        # A beta distribution of that mean.
        confidence = self.confidence(text, draw)
        # Each class is a fifth as likely as the one before.
        weights = [0.2**rank for rank in range(len(self.classes) - 1)]
        shares = [confidence]
        shares += [(1 - confidence) * weight / sum(weights) for weight in weights]
        ranked = [name for name in self.classes if name != gold]
        draw.shuffle(ranked)
        ranked.insert(draw.choices(range(len(shares)), shares)[0], gold)
        return dict(zip(ranked, shares, strict=True))

    def answer(self, body: bytes) -> bytes:
        """Return the response to a chat request whose last message is a text: its class, or if the
        request holds the answer to a JSON schema, the object with it."""
        asked = json.loads(body)
        text = asked["messages"][-1]["content"]
        try:
            found = self.probabilities(text)
        except KeyError:
            return response({"error": {"message": f"no gold class of the text {text!r}"}}, 400)
        shares = list(found.items())[:ALTERNATIVES]
        tokens = [token(shares)]
        if asked.get("response_format", {}).get("type") == "json_schema":
            before, after = json.dumps({"answer": "/"}).split("/")
            tokens = [token([(before, 1.0)]), *tokens, token([(after, 1.0)])]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "".join(entry["token"] for entry in tokens),
                "refusal": None,
            },
            "finish_reason": "stop",
            "logprobs": None,
        }
        if asked.get("logprobs"):
            choice["logprobs"] = {"content": tokens, "refusal": None}
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


def token(shares: list[tuple[str, float]]) -> dict[str, Any]:
    """Return the entry of logprobs.content for the first of the alternatives `shares`."""
    top = [
        {"token": name, "logprob": math.log(share), "bytes": list(name.encode())}
        for name, share in shares
    ]
    return {**top[0], "top_logprobs": top}


async def serve(teacher: NoisyTeacher) -> None:
    await until_stdin_ends(await asyncio.start_server(teacher.connected, "127.0.0.1", 0))


if __name__ == "__main__":
    answers = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    named = (sys.argv[2], float(sys.argv[3])) if sys.argv[2:] else ()
    asyncio.run(serve(NoisyTeacher(answers, *named)))
