"""Taking in what a batch has answered: answers into the label database, entries into the ledger."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from distillery.errors import TeacherError
from distillery.labels.acceptance import stored_answer
from distillery.labels.batch_book import Batch, BatchBook, lost_call
from distillery.labels.batch_files import Answers, Share, most_of
from distillery.labels.journal import keep_unreadable
from distillery.labels.questions import Question
from distillery.labels.quote import estimated_tokens
from distillery.labels.store import LabelStore
from distillery.recipe import PriceRecipe
from distillery.records import Usage
from distillery.teacher.batch import BatchService, ServiceBatch
from distillery.teacher.budget import cost_of
from distillery.teacher.endpoint import Endpoint
from distillery.teacher.ledger import Call, Outcome
from distillery.teacher.reply import Completion, read_completion, usage_of

BOOKED_LINES = 1000
"""Lines that answer none of the run's questions, after which what is written is committed."""

_log = logging.getLogger(__name__)


class BatchIntake:
    """Takes the answers of ended batches in. `share`: whose purpose the entries of lines have that
    answer none of the run's questions.

    Invariant: an answer is committed to the label store, and its call to the ledger, before the
    request leaves the book. The call's id comes from the batch and the request, so that an answer
    that is taken in twice counts once."""

    def __init__(
        self,
        share: Share,
        endpoint: Endpoint,
        store: LabelStore,
        book: BatchBook,
        service: BatchService,
    ) -> None:
        self._share, self._endpoint = share, endpoint
        self._store, self._book, self._service = store, book, service

    async def download(
        self, batch: Batch, seen: ServiceBatch, folder: Path, is_waited_for: bool
    ) -> Answers | None:
        """Download an ended batch's files; it may have none of either kind. Raises TeacherError if
        they are gone: the answers in them are paid for. None if the run waits for none of them."""
        files = []
        for kind, file_id in (("output", seen.output_file), ("errors", seen.error_file)):
            path = folder / f"{batch.batch_id}.{kind}"
            if not file_id:
                continue
            if not await self._service.download(file_id, path):
                if not is_waited_for:
                    _log.warning("batch %s: its answers are gone", seen.service_id)
                    return None
                raise TeacherError(
                    f"{self._endpoint.url} has no file {file_id} of the batch {seen.service_id} "
                    f"any more; give it up: distillery labels batches --forget {batch.batch_id}"
                )
            files.append(path)
        requests = await asyncio.to_thread(self._book.keys_of, batch.batch_id)
        return await asyncio.to_thread(Answers, batch, requests, files, seen.status)

    async def note_failure(self, batch: Batch, seen: ServiceBatch) -> None:
        """Leave the requests of a batch that the service did not accept to be asked again."""
        keys = await asyncio.to_thread(self._book.keys_of, batch.batch_id)
        await asyncio.to_thread(self._book.settle, batch.batch_id, [], [], list(keys))
        _log.warning("batch %s failed: %s", seen.service_id, seen.error)

    def take(self, share: Share, question: Question, answers: Answers) -> None:
        """Store one answer with its entry in the ledger, or note that it failed."""
        batch = answers.batch
        recipe = share.recipe.in_batch
        line = answers.take(question.key, self._endpoint)
        used: Usage | None = Usage()
        completion: Completion | None = None
        outcome: Outcome = "retried"
        if line.payload is not None:
            last = recipe.answers.form == "rationale"
            completion = read_completion(
                line.payload, question.names, last, self._endpoint.redact, recipe.stop
            )
            used, outcome = usage_of(line.payload), "answer"
        elif line.failure is not None and line.failure.question_refusal:
            used = line.failure.billed_usage(estimated_tokens(question))
            completion, outcome = Completion("", line.failure.question_refusal), "refused"
        most = most_of(question, recipe)
        if completion is None:
            answers.note_failed(line)
            self._store.record(self._entry(batch, question.key, share, outcome, used, most))
            return
        answer = stored_answer(question, completion, recipe, self._endpoint.identity)
        if completion.finish_reason == "content_filter":
            outcome = "filtered"
        elif outcome == "answer" and answer.answer is None:
            outcome = "rejected"
        self._store.add(answer, self._entry(batch, question.key, share, outcome, used, most))
        answers.answered.append(question.key)

    def _entry(
        self,
        batch: Batch,
        key: str,
        share: Share,
        outcome: Outcome,
        used: Usage | None,
        most: Usage,
    ) -> Call:
        """Return a line's entry in the ledger, on behalf of the run that sent it."""
        prices = PriceRecipe.model_validate(batch.prices) if batch.prices else None
        counted = used is not None and outcome not in ("filtered", "refused")
        taken = most if used is None else used
        return replace(
            lost_call(batch, key),
            purpose=share.purpose,
            outcome=outcome,
            prompt_tokens=taken.prompt_tokens,
            cached_tokens=taken.cached_tokens,
            completion_tokens=taken.completion_tokens,
            is_counted=counted,
            cost=cost_of(taken, prices),
        )

    async def settle(self, answers: Answers) -> None:
        """Book the calls that this run has no question for, and have the requests whose answers are
        stored leave the book. Those that failed are to be asked again; answers to questions that
        are not this run's stay at the service for the run that has them. Lines that can't be read
        are kept on this machine: an answer in one is paid for."""
        batch = answers.batch
        if answers.unreadable and not batch.booked_at:
            kept = await asyncio.to_thread(
                keep_unreadable, self._store.database, batch.batch_id, answers.unreadable
            )
            _log.warning(
                "batch %s: %d lines that can't be read, kept in %s",
                batch.service_id,
                len(answers.unreadable),
                kept,
            )
        # An equal entry of a run that reads the answer later counts once with this one.
        for number, key in enumerate(answers.rest(), start=1):
            line = answers.take(key, self._endpoint)
            used: Usage | None = Usage()
            if line.payload is None:
                answers.note_failed(line)
            else:
                used = usage_of(line.payload)
            self._book_unread(batch, key, "retried" if line.payload is None else "answer", used)
            if number % BOOKED_LINES == 0:
                await asyncio.to_thread(self._store.flush)
        for key in answers.lost:
            self._book_unread(batch, key, "lost", None)
        await asyncio.to_thread(self._store.flush)
        untried = answers.untried
        failed = [*answers.failed, *answers.lost]
        left = await asyncio.to_thread(
            self._book.settle, batch.batch_id, answers.answered, failed, untried
        )
        told = f"{len(answers.answered):,} answers taken in"
        if failed or untried:
            told += f", {len(failed) + len(untried):,} requests to be asked again"
        if left:
            told += f", {left:,} left at the service for runs that ask for them"
        _log.info("batch %s: %s", batch.service_id, told)

    def _book_unread(self, batch: Batch, key: str, outcome: Outcome, used: Usage | None) -> None:
        """Write the entry of a line that answers none of this run's questions, or of a request
        whose line is missing."""
        share = self._share
        if used is None:
            entry = replace(lost_call(batch, key), purpose=share.purpose, outcome=outcome)
        else:
            entry = self._entry(batch, key, share, outcome, used, used)
        self._store.record(entry)
