"""The gate's rules as data: what a student must show before it is registered."""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import AliasChoices, Field, model_validator

from distillery.recipe.base import Slice

Confidence = Annotated[float, Field(gt=0.5, lt=1)]
"""Confidence of a one-sided bound."""

Baseline = Literal[
    "majority class",
    "TF-IDF + logistic regression",
    "linear probe",
    "nearest answer",
    "field dictionary",
    "base model",
]
"""Predictors of the scoreboard that a student can be asked to beat, by their names there. Where
answers are written, these are nearest answer, with task.kind: extract field dictionary, and base
model."""


class Rule(Slice):
    """What all rules have."""

    name: str | None = Field(None, pattern=r"^[^\n|]+$")
    """The rule's name in the gate's verdicts. null: a name made from its settings."""

    undecided: Literal["refused", "passed"] = "refused"
    """What the verdict undecided counts as."""

    @property
    def content(self) -> str:
        """What the rule asks for, in words."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        return self.name or self.content


class BetterRule(Rule):
    """The student is better than another predictor of the scoreboard, on the same test rows: more
    accurate or, where answers are written, ahead in task.metric.

    For this rule the majority class is the most frequent answer of the test rows, so that no
    student that always gives the same answer passes. The scoreboard's majority class is the most
    frequent answer of the training rows, which can be rare in the test rows.
    """

    kind: Literal["better"]
    """The kind of the rule."""

    than: Baseline
    """The predictor to beat."""

    confidence: Confidence = 0.95
    """Confidence of the one-sided bound of the difference, which must be above 0."""

    @property
    def content(self) -> str:
        return f"better than {self.than}"


class KeepsRule(Rule):
    """The student keeps a share of the teacher's accuracy or, where answers are written, of its
    task.metric, on the test rows."""

    kind: Literal["keeps"]
    """The kind of the rule."""

    share: float = Field(ge=0, le=1)
    """Share of the teacher's accuracy or task.metric. 0.95: 95 %."""

    confidence: Confidence | None = None
    """Confidence of the share's one-sided bound. null: the share itself counts, without a bound."""

    @property
    def content(self) -> str:
        return f"keeps {100 * self.share:g} % of the teacher's accuracy"


class NotWorseRule(Rule):
    """The student is at most `margin` worse than an earlier version, on the test rows that both
    answered.

    The rule is passed if there is no such version yet, or if the student is the champion.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"than"})

    kind: Literal["not_worse"]
    """The kind of the rule."""

    than: str = Field("champion", pattern=r"^(champion|best|[0-9]+)$")
    """The version to compare with: champion; best, the one that is furthest ahead of the student on
    shared rows; or the number of a version. As an anchor, the latter two keep small losses from
    adding up over many runs. The best is chosen among the versions that share at least half of the
    test rows; versions that were rejected or rolled back are left out."""

    margin: float = Field(0.02, ge=0, le=1)
    """Accuracy or task.metric that the student may lose. 0.02: two points."""

    confidence: Confidence | None = 0.95
    """Confidence of the one-sided bound of the difference. null: the difference itself counts,
    without a bound."""

    @property
    def content(self) -> str:
        versions = {"champion": "the champion", "best": "the best"}
        than = versions.get(self.than, f"version {self.than}")
        return f"at most {100 * self.margin:g} points worse than {than}"


Estimated = Literal[
    "accuracy",
    "agreement",
    "macro_f1",
    "recall",
    "calibration_error",
    "kl_from_teacher",
    "order_robustness",
    "exact_match",
    "field_f1",
    "rouge_l",
    "chrf",
    "bleu",
    "valid",
    "win_rate",
]
"""Figures that are estimates from the test rows, so that they have intervals."""

Measured = Literal[
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "first_token_ms",
    "load_s",
    "peak_mib",
    "bytes",
    "parameters",
    "rows_per_second",
    "tokens_per_second",
]
"""Figures without an interval."""


class LimitRule(Rule):
    """A figure of the student on the scoreboard is within limits."""

    added_later: ClassVar[frozenset[str]] = frozenset({"of_class", "confidence"})

    kind: Literal["limit"]
    """The kind of the rule."""

    figure: Estimated | Measured
    """The figure. From 0 to 1: accuracy, agreement with the teacher, macro_f1, the recall of a
    class, the expected calibration_error, and order_robustness, the share of rows answered alike in
    another order of options. Where answers are written, accuracy is task.metric, and there are
    exact_match, field_f1 or rouge_l, chrf and bleu, valid, the share of rows with a valid answer,
    and win_rate by evaluation.judge, 0.5 where it prefers neither student nor teacher; all from 0
    to 1. kl_from_teacher in nats. Latencies and first_token_ms, the time to the first token, in
    milliseconds, load_s in seconds, peak_mib in MiB, the folder's bytes, parameters, rows a second,
    and tokens a second of written answers."""

    of_class: str | None = Field(
        None, pattern=r"^[^\n|]+$", validation_alias=AliasChoices("class", "of_class")
    )
    """For recall, the class: the option's text where all rows have the same options, otherwise its
    letter."""

    minimum: float | None = None
    """The lowest value that passes. null: any."""

    maximum: float | None = None
    """The highest value that passes. null: any."""

    confidence: Confidence | None = None
    """Confidence of the figure's one-sided bound, which must be within the limits. Figures that are
    measured, such as latencies and bytes, have none. null: the figure itself counts, without a
    bound."""

    @property
    def content(self) -> str:
        parts = []
        if self.minimum is not None:
            parts.append(f"at least {self.minimum:,.10g}")
        if self.maximum is not None:
            parts.append(f"at most {self.maximum:,.10g}")
        figure = f"recall of {self.of_class}" if self.of_class else self.figure
        return f"{figure} {' and '.join(parts)}"

    @model_validator(mode="after")
    def check_limits(self) -> Self:
        low, high = self.minimum, self.maximum
        if low is None and high is None:
            raise ValueError("a limit needs minimum, maximum or both")
        if low is not None and high is not None and low > high:
            raise ValueError("minimum is above maximum, so that no figure can pass")
        return self

    @model_validator(mode="after")
    def check_figure(self) -> Self:
        if self.figure == "recall" and self.of_class is None:
            raise ValueError("a limit on recall needs class: the option whose recall is meant")
        if self.figure != "recall" and self.of_class is not None:
            raise ValueError(f"class belongs to the figure recall; remove it from {self.figure}")
        if self.confidence is not None and self.figure not in get_args(Estimated):
            estimated = ", ".join(get_args(Estimated))
            raise ValueError(
                f"{self.figure} has no interval, only {estimated} have one; remove confidence"
            )
        return self


class RowsRule(Rule):
    """The student has answered enough test rows; with fewer, the rule is undecided."""

    kind: Literal["rows"]
    """The kind of the rule."""

    minimum: int = Field(ge=1)
    """The smallest number of test rows."""

    @property
    def content(self) -> str:
        return f"at least {self.minimum:,} test rows"


GateRule = Annotated[
    BetterRule | KeepsRule | NotWorseRule | LimitRule | RowsRule, Field(discriminator="kind")
]
