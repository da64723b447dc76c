"""How much and how long the server takes, so that one client can't keep it from the others."""

from dataclasses import dataclass

LARGEST_BODY = 4 << 20
"""Bytes of the largest request."""

MOST_MESSAGES = 1000
MOST_PARTS = 1000
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_CHOICES, LONGEST_CHOICE = 64, 16_384
LONGEST_NAME = 256
MOST_TOKENS = 1 << 20
LARGEST_SEED = (1 << 63) - 1

LONGEST_PASS = 512
"""Tokens of a prompt that are computed before the server looks whether the client still waits."""


@dataclass(frozen=True)
class Limits:
    """`queue`: requests at once, those whose bodies are being read and the one that is answered
    included; others are told to come again. In seconds: `header_s` and `body_s`, in which a request
    must have come; `answer_s`, in which its answer must be complete, the time that it waits
    included. It is that after which the openai package gives up by itself."""

    queue: int = 64
    header_s: float = 15.0
    body_s: float = 30.0
    answer_s: float = 600.0
