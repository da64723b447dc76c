"""evaluation/baselines"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distillery.data.examples import read_examples
from distillery.evaluation.scoring import Answers
from distillery.records import Example

MAJORITY, TFIDF = "majority class", "TF-IDF + logistic regression"


def score_baselines(
    examples: Sequence[Example], train: Path | None
) -> tuple[dict[str, Answers], list[str]]:
    """The baselines' answers, and a line for each that is left out."""
    learnt = [example for example in read_examples(train) if example.answer_key] if train else []
    if not learnt:
        return {}, [f"{MAJORITY} and {TFIDF} are left out: there is no answered row to learn from."]
    keys = [str(example.answer_key) for example in learnt]
    majority = Counter(keys).most_common(1)[0][0]
    answers: dict[str, Answers] = {MAJORITY: [majority] * len(examples)}
    if len({example.choices for example in (*learnt, *examples)}) > 1:
        return answers, [
            f"{TFIDF} is left out: the options differ from row to row, so that letters are no classes."
        ]
    if len(set(keys)) < 2:
        return answers, [f"{TFIDF} is left out: all rows to learn from have one answer."]
    answers[TFIDF] = _tfidf(learnt, keys, examples)
    return answers, []


def _tfidf(
    learnt: Sequence[Example], keys: Sequence[str], examples: Sequence[Example]
) -> list[str]:
    """Logistic regression (C = 10) over the question's words and pairs of words, term frequencies sublinear."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)  # type: ignore[no-untyped-call]
    classifier = LogisticRegression(C=10, max_iter=1000)  # type: ignore[no-untyped-call]
    pipeline = make_pipeline(words, classifier)  # type: ignore[no-untyped-call]
    pipeline.fit([example.question for example in learnt], keys)
    return [str(letter) for letter in pipeline.predict([example.question for example in examples])]
