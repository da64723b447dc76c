from collections.abc import Sequence

from distillery.evaluation.report import ANSWERS_FILE
from distillery.labels.report import read_report
from distillery.records import Artifact, Outcome
from distillery.report.page import StageLine, write_page
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.stage import uncached


@uncached("report")
def report_page(outcome: Outcome, verdict: str, stages: Sequence[StageLine]) -> Artifact:
    """Write the run's page and keep it in the store."""
    store = ArtifactStore()
    champion_answers = None
    if outcome.decision.champion_answers:
        champion_answers = store.fetch(outcome.decision.champion_answers) / ANSWERS_FILE
    preferences = None
    if outcome.preferences:
        preferences = store.fetch(outcome.preferences.artifact)
    with working_folder("report") as folder:
        write_page(
            folder,
            outcome,
            evaluation=store.fetch(outcome.report.artifact),
            labels=read_report(store.fetch(outcome.labels.artifact)),
            verdict=verdict,
            stages=stages,
            champion_answers=champion_answers,
            preferences=preferences,
        )
        return store.put(folder)
