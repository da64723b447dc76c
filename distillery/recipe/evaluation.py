"""The evaluation slice: what the gate asks of a student before it is registered, and the judge."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice
from distillery.recipe.judge import JudgeRecipe
from distillery.recipe.rules import BetterRule, GateRule, KeepsRule, NotWorseRule

DEFAULT_RULES: tuple[GateRule, ...] = (
    BetterRule(kind="better", than="majority class"),
    BetterRule(kind="better", than="base model"),
    KeepsRule(kind="keeps", share=0.8),
    NotWorseRule(kind="not_worse"),
    NotWorseRule(kind="not_worse", than="best", confidence=0.99),
)
"""The rules of a recipe that gives none. The second is for students that start from the base model.
The last is the anchor: it is tested again with each run, so that its confidence is higher;
benchmarks/simulate_gate.py measures what that comes to."""

NEAREST_RULE = BetterRule(kind="better", than="nearest answer")
"""The first rule where answers are written, which have no majority class."""


class EvaluationRecipe(Slice):
    """The gate's rules, and a judge of texts. All go by the test rows, and the student must pass
    each rule.

    `minimum_kept` and `maximum_loss` are older settings, by point estimates. Each takes the place
    of the rules of its kind, given or default, and leaves the other rules as they are.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"rules", "on_refusal", "judge"})
    outside_keys: ClassVar[frozenset[str]] = frozenset({"processes"})

    rules: tuple[GateRule, ...] | None = None
    """What the student must show, such as [{kind: better, than: majority class}]. []: nothing.
    null, with task.kind: choice: it is better than the majority class, and than the base model if
    it starts from that, both at 95 % confidence; it keeps 80 % of the teacher's accuracy; it is at
    most 2 points worse than the champion, at 95 % confidence, and than the best version so far, at
    99 %. The other kinds have rules of their own, which docs/how-to/gate.md lists."""

    minimum_kept: float | None = Field(None, ge=0, le=1)
    """Short for the rule {kind: keeps, share: MINIMUM_KEPT}. 0: no such rule. null: as in
    `rules`."""

    maximum_loss: float | None = Field(None, ge=0, le=1)
    """Short for the rule {kind: not_worse, margin: MAXIMUM_LOSS, confidence: null}. 1: no such
    rule, so that a student passes even if it shares no test row with the champion. null: as in
    `rules`."""

    on_refusal: Literal["complete", "fail"] = "complete"
    """What becomes of a run whose student the gate refuses. complete: it completes, and the
    champion stays. fail: it fails once everything is recorded, and `python -m flows.distill` exits
    with 3, so that CI fails."""

    judge: JudgeRecipe | None = Field(None, exclude_if=lambda judge: judge is None)
    """With task.kind: generate, a model that compares the student's answers with the teacher's.
    null: none is asked."""

    processes: int = Field(1, ge=1, le=256, exclude_if=lambda count: count == 1)
    """The most processes that ask the models of the scoreboard at once, where there are many test
    rows: processes of this machine, or with the parameter evaluation_deployment runs of that
    deployment. What they find is the same, bit for bit, as what one finds."""

    def gate_rules(self, starts_from_base: bool, writes: bool = False) -> tuple[GateRule, ...]:
        """Return the rules that hold; `starts_from_base` tells whether the student starts from the
        base model, `writes` whether answers are written."""
        rules = self.rules
        if rules is None:
            first = NEAREST_RULE if writes else DEFAULT_RULES[0]
            rules = (first, *DEFAULT_RULES[1 if starts_from_base else 2 :])
        if self.minimum_kept is not None:
            rules = tuple(rule for rule in rules if rule.kind != "keeps")
            if self.minimum_kept > 0:
                rules += (KeepsRule(kind="keeps", share=self.minimum_kept),)
        if self.maximum_loss is not None:
            rules = tuple(rule for rule in rules if rule.kind != "not_worse")
            if self.maximum_loss < 1:
                rules += (
                    NotWorseRule(kind="not_worse", margin=self.maximum_loss, confidence=None),
                )
        return rules

    @model_validator(mode="after")
    def check_names_differ(self) -> Self:
        titles = [rule.title for rule in self.rules or ()]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"rules: two are named {title!r}; remove one or give it a name")
        return self
