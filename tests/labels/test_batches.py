"""Asking in batches against a stand-in of the Batch API: what is sent, what is taken in, and what
it costs."""

from batch_endpoint import BatchEndpoint, Plan
from batch_runs import asked_in_batches, batch_teacher
from label_runs import example


async def test_rows(url: str) -> None:
    rows = [example(number) for number in range(20)]
    with BatchEndpoint(lambda number: Plan(looks=2)) as service:
        await asked_in_batches(service, url, rows, batch_teacher())
        print(service.requests)
        print(service.asked, service.answered)
