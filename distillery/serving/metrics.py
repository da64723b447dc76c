"""What the server counts, for Prometheus: GET /metrics."""

import os
import time

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from distillery.serving.completion import Job

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the folder in which server processes count together. prometheus_client
reads it when it is imported."""

CONTENT_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""The histograms' bounds. An answer takes from one short pass to Limits.answer_s."""


class Metrics:
    """The metrics of a server: of its process or, where there are several, of all of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.is_shared = SHARED_FOLDER in os.environ
        if not self.is_shared:
            ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "distillery_requests",
            "Requests for an answer, by the HTTP status of the reply.",
            ["status"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "distillery_tokens",
            "Tokens of prompts and of answers.",
            ["kind"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "distillery_first_token_seconds",
            "Seconds from a request to the first token of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answer = Histogram(
            "distillery_answer_seconds",
            "Seconds from a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            "distillery_requests_waiting",
            "Requests that wait or are answered.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )

    def ended(self, job: Job) -> None:
        """Count a job that has ended, or was given up."""
        self.waiting.dec()
        self.tokens.labels("prompt").inc(job.prompt_tokens)
        self.tokens.labels("answer").inc(job.completion_tokens)
        if job.spoke is not None:
            self.first_token.observe(job.spoke - job.came)
            self.answer.observe(time.monotonic() - job.came)

    def text(self) -> bytes:
        """Return them in Prometheus's text format."""
        registry = self.registry
        if self.is_shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
