"""The service that answers files of requests: OpenAI's Batch API, which Azure has too, through the
openai SDK (platform.openai.com/docs/guides/batch;
learn.microsoft.com/azure/ai-foundry/openai/how-to/batch).

A file holds a request a line. It is uploaded, a batch is made of it, and within a day there are a
file of answers and a file of errors, whose lines name their requests by `custom_id` and come in any
order. Which questions go into a file, and what becomes of the answers, is in labels/batch_run.py.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from distillery.errors import (
    DistilleryError,
    RecipeError,
    TeacherError,
    TeacherUnavailable,
    one_line,
)
from distillery.recipe import TeacherRecipe
from distillery.teacher.clients import open_openai, openai_failure
from distillery.teacher.endpoint import AZURE_HOSTS, Endpoint, host_of, log_in
from distillery.teacher.failures import BACKOFF, CallFailed, final_error
from distillery.teacher.reply import count_of, list_of, mapping_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types import Batch, FileObject

T = TypeVar("T")

_log = logging.getLogger(__name__)

UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
"""The states of a batch that may still give answers. The others: completed, failed (nothing was
asked), expired and cancelled (what was answered until then is there)."""

QUOTA_CODES = ("token_limit_exceeded", "enqueued_token_limit_exceeded")
"""The codes of a failed batch for which there was no room in the endpoint's queue."""

NO_CREDIT = "insufficient_quota"
"""The code of a failed batch whose account has no credit left."""

KEPT_S = 30 * 24 * 3600
"""How long the service keeps a file, in seconds: the longest that Azure takes."""

FILE_POLL_S = 2.0

FILE_WAIT_S = 600.0
"""How long a file may take until the service has read it."""

PAGE = 100


@dataclass(frozen=True)
class ServiceBatch:
    """A batch as the service describes it. `done` of `lines` lines are answered or have failed.
    `error` is why it failed, with the `code` and the file's line; "" for any other state."""

    service_id: str
    status: str
    output_file: str = ""
    error_file: str = ""
    done: int = 0
    lines: int = 0
    code: str = ""
    error: str = ""

    @property
    def is_under_way(self) -> bool:
        """Whether answers may still come."""
        return self.status in UNDER_WAY

    @property
    def lacks_quota(self) -> bool:
        """Whether it failed because the endpoint's queue was full."""
        return self.status == "failed" and self.code in QUOTA_CODES


@dataclass(frozen=True)
class BatchLine:
    """A line of an output or error file: the answer's JSON, or the failure."""

    key: str
    payload: dict[str, Any] | None
    failure: CallFailed | None = None


def check_takes_batches(recipe: TeacherRecipe, endpoint: Endpoint) -> None:
    """Raise RecipeError if teacher.batch is set for an endpoint that another SDK than openai
    asks."""
    if recipe.batch is None or endpoint.sdk == "openai":
        return
    raise RecipeError(
        f"{endpoint.section}.batch: {endpoint.url} is asked through {endpoint.sdk}, which knows no "
        f"batches; set {endpoint.variables}_ENDPOINT to the resource's address at /openai/v1, or "
        "remove this setting"
    )


def path_of_requests(endpoint: Endpoint) -> str:
    """Return the path that a line's request is for: Azure's documentation has it without /v1."""
    if host_of(endpoint.url).endswith(AZURE_HOSTS):
        return "/chat/completions"
    return "/v1/chat/completions"


def request_line(key: str, path: str, body: dict[str, Any]) -> bytes:
    """Return the line of a request, whose answer will be known by `key`."""
    line = {"custom_id": key, "method": "POST", "url": path, "body": body}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def key_of_line(line: bytes) -> str:
    """Return the key of an output's line; "" if it is no line of a batch."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return str(mapping_of(parsed).get("custom_id") or "")


def read_line(line: bytes, endpoint: Endpoint) -> BatchLine:
    """Return what a line of an output or error file says. A request that the service did not come
    to, as in a batch that expired, has failed without a status."""
    parsed = mapping_of(json.loads(line))
    key = str(parsed.get("custom_id") or "")
    response = mapping_of(parsed.get("response"))
    status, body = response.get("status_code"), response.get("body")
    if status == 200 and isinstance(body, dict):
        return BatchLine(key, body)
    told = body if response else {"error": mapping_of(parsed.get("error"))}
    text = told if isinstance(told, str) else json.dumps(told)
    status = status if isinstance(status, int) else None
    return BatchLine(key, None, CallFailed(status, text, redact=endpoint.redact))


class BatchService:
    """The endpoint's files and batches. Every method raises CredentialsError, TeacherUnavailable
    after teacher.attempts tries, and TeacherError for what the service refuses."""

    def __init__(
        self, client: "AsyncOpenAI", endpoint: Endpoint, attempts: int, timeout_s: float
    ) -> None:
        self._client, self._endpoint = client, endpoint
        self._attempts, self._timeout_s = attempts, timeout_s

    async def upload(self, path: Path, name: str) -> str:
        """Upload a file under `name` and return its id. If a try may have succeeded, the file is
        looked for."""

        async def create() -> str:
            with path.open("rb") as lines:
                file = await self._client.files.create(
                    file=(name, lines),
                    purpose="batch",
                    expires_after={"anchor": "created_at", "seconds": KEPT_S},
                )
            return file.id

        file_id, _ = await self._create(create, lambda: self._find_file(name))
        return file_id

    async def create(self, file_id: str, batch_id: str, digest: str, window: str) -> str:
        """Make a batch of a file, once the service has read that, and return the service's id of
        it. Its metadata names our own `batch_id` and the file's digest."""

        async def create() -> str:
            batch = await self._client.batches.create(
                input_file_id=file_id,
                endpoint=path_of_requests(self._endpoint),  # type: ignore[arg-type]
                completion_window=window,  # type: ignore[arg-type]
                metadata={"distillery_batch": batch_id, "distillery_digest": digest},
            )
            return batch.id

        await self._wait_for_file(file_id)
        service_id, tries = await self._create(create, lambda: self._find_batch(batch_id))
        if tries > 1:
            # A try whose response was lost may have made a second one since it was looked for.
            return await self.find_batch(batch_id) or service_id
        return service_id

    async def cancel(self, service_id: str) -> None:
        """Have the service end a batch, if it is under way."""
        await self._patiently(lambda: self._cancel(service_id))

    async def find_file(self, name: str) -> str:
        """Return the id of the file of that name; "" if there is none."""
        return await self._patiently(lambda: self._find_file(name))

    async def find_batch(self, batch_id: str) -> str:
        """Return the service's id of the batch whose metadata name `batch_id`; "" if there is none.
        If there are several, one is kept and the others are cancelled."""
        return await self._patiently(lambda: self._find_batch(batch_id))

    async def look_at(self, service_id: str) -> ServiceBatch | None:
        """Return how a batch is; None if the service does not know it."""
        try:
            return await self._patiently(lambda: self._retrieve(service_id), missing=True)
        except CallFailed:
            return None

    async def download(self, file_id: str, path: Path) -> bool:
        """Write a file of the service's to `path`. Return whether it is still there."""

        async def fetch() -> None:
            files = self._client.files.with_streaming_response
            async with files.content(file_id) as response:
                await response.stream_to_file(path)

        try:
            await self._patiently(fetch, missing=True)
        except CallFailed:
            return False
        return True

    async def _find_file(self, name: str) -> str:
        files = self._client.files.list(purpose="batch", order="desc", limit=PAGE)
        found: FileObject
        async for found in files:
            if found.filename == name:
                return found.id
        return ""

    async def _find_batch(self, batch_id: str) -> str:
        # All pages are read: nothing promises their order.
        found: Batch
        same = []
        async for found in self._client.batches.list(limit=PAGE):
            if (found.metadata or {}).get("distillery_batch") == batch_id:
                same.append(found)
        if not same:
            return ""
        alive = (*UNDER_WAY[:-1], "completed")
        kept, *twins = sorted(same, key=lambda b: (b.status not in alive, b.created_at, b.id))
        for twin in twins:
            if twin.status in UNDER_WAY[:-1]:
                _log.warning("batch %s is a second one of %s: cancelled", twin.id, kept.id)
                await self._cancel(twin.id)
        return kept.id

    async def _cancel(self, service_id: str) -> None:
        from openai import APIStatusError

        try:
            await self._client.batches.cancel(service_id)
        except APIStatusError as error:
            # It has ended meanwhile, or is not known.
            if error.status_code not in (400, 404, 409):
                raise

    async def _retrieve(self, service_id: str) -> ServiceBatch:
        batch = await self._client.batches.retrieve(service_id)
        counts = batch.request_counts
        code = error = ""
        if batch.status == "failed":
            errors = list_of(mapping_of(batch.to_dict().get("errors")).get("data"))
            first = mapping_of(errors[0]) if errors else {}
            code, error = str(first.get("code") or ""), str(first.get("message") or "")
            if first.get("line") is not None:
                error += f" (line {first['line']})"
        return ServiceBatch(
            service_id=batch.id,
            status=batch.status,
            output_file=batch.output_file_id or "",
            error_file=batch.error_file_id or "",
            done=count_of(counts.completed) + count_of(counts.failed) if counts else 0,
            lines=count_of(counts.total) if counts else 0,
            code=code,
            error=one_line(self._endpoint.redact(error)),
        )

    async def _wait_for_file(self, file_id: str) -> None:
        """Wait until the service has read a file: Azure makes no batch of one before. Raises
        TeacherUnavailable after FILE_WAIT_S."""
        until = time.monotonic() + FILE_WAIT_S
        while True:
            file = await self._patiently(lambda: self._client.files.retrieve(file_id))
            if file.status == "error":
                raise TeacherError(
                    f"{self._endpoint.section}.batch: {self._endpoint.url} can't read the file "
                    f"{file_id} ({file.status_details or 'no reason given'}); run again"
                )
            if str(file.status) not in ("pending", "running"):
                return
            if time.monotonic() > until:
                raise TeacherUnavailable(
                    f"{self._endpoint.url}: has not read the file {file_id} for "
                    f"{FILE_WAIT_S / 60:.0f} min"
                )
            await asyncio.sleep(FILE_POLL_S)

    async def _create(
        self, create: Callable[[], Awaitable[str]], find: Callable[[], Awaitable[str]]
    ) -> tuple[str, int]:
        """Return the id of what `create` makes, and the tries. A try whose response was lost may
        have made it, so that it is looked for before the next one."""
        tries = 0

        async def once() -> str:
            nonlocal tries
            tries += 1
            return (tries > 1 and await find()) or await create()

        return await self._patiently(once), tries

    async def _patiently(self, work: Callable[[], Awaitable[T]], missing: bool = False) -> T:
        """Return what `work` does, in teacher.attempts tries. `missing`: raise CallFailed for what
        is not there (404)."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, CallFailed) and error.is_worth_a_retry
            ),
            wait=BACKOFF,
            stop=stop_after_attempt(self._attempts),
            reraise=True,
        )
        try:
            return await retrying(self._once, work)
        except CallFailed as failure:
            if missing and failure.status == 404:
                raise
            raise self._final_error(failure) from None

    async def _once(self, work: Callable[[], Awaitable[T]]) -> T:
        from azure.core.exceptions import AzureError
        from openai import OpenAIError

        try:
            return await work()
        except (OpenAIError, AzureError, ValueError, RecursionError) as error:
            failure = openai_failure(error, self._endpoint)
        raise failure

    def _final_error(self, failure: CallFailed) -> DistilleryError:
        section, url = self._endpoint.section, self._endpoint.url
        told = f"{failure.status}: {one_line(failure.message)}"
        if failure.status in (404, 405, 501):
            return TeacherError(
                f"{section}.batch: {urlsplit(url).netloc} answers no batches ({told}); remove this "
                "setting, or use an endpoint that does"
            )
        if failure.status in (401, 403) or failure.is_worth_a_retry:
            return final_error(failure, self._endpoint, self._attempts, self._timeout_s)
        return TeacherError(f"{section}.batch: {url} refuses it ({told}); correct the setting")


@asynccontextmanager
async def batch_service(recipe: TeacherRecipe, endpoint: Endpoint) -> AsyncIterator[BatchService]:
    """Yield the endpoint's batch service. Raises CredentialsError if there is no login."""
    credential = await log_in(endpoint)
    client = open_openai(endpoint, credential, recipe.timeout_s)
    try:
        yield BatchService(client, endpoint, recipe.attempts, recipe.timeout_s)
    finally:
        await client.close()
        if credential:
            await credential.close()


def each_line(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, each with the position where it begins, in bytes."""
    position = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield position, line
            position += len(line)
