"""What a model must beat: the most frequent answer, and a classifier of words."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distillery.data.examples import read_examples
from distillery.evaluation.scoring import Answers
from distillery.records import Example

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"


def score_baselines(
    examples: Sequence[Example], train: Path | None
) -> tuple[dict[str, Answers], list[str]]:
    """Return the baselines' answers to `examples` by name, and a note on each that is left out.

    They learn from the answered rows of the file `train`."""
    questions, keys = [], []
    choices = {example.choices for example in examples}
    to_learn_from: list[Example] = []
    if train:
        to_learn_from = read_examples(train)
    for example in to_learn_from:
        if example.answer_key:
            questions.append(example.question)
            keys.append(example.answer_key)
            choices.add(example.choices)
    if not keys:
        return {}, [f"{MAJORITY} and {TFIDF} are left out: there is no answered row to learn from."]
    most_frequent = Counter(keys).most_common(1)[0][0]
    answers: dict[str, Answers] = {MAJORITY: [most_frequent] * len(examples)}
    if len(choices) > 1:
        reason = "the options differ from row to row, so that letters are no classes"
        return answers, [f"{TFIDF} is left out: {reason}."]
    if len(set(keys)) == 1:
        return answers, [f"{TFIDF} is left out: all rows to learn from have one answer."]
    answers[TFIDF] = classify_words(questions, keys, [example.question for example in examples])
    return answers, []


def classify_words(texts: Sequence[str], letters: Sequence[str], asked: Sequence[str]) -> list[str]:
    """Learn the texts' letters and return a letter for each text that is asked.

    Logistic regression (C = 10) over words and pairs of words, with sublinear term frequencies."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)  # type: ignore[no-untyped-call]
    classifier = LogisticRegression(C=10, max_iter=1000)  # type: ignore[no-untyped-call]
    pipeline = make_pipeline(words, classifier)  # type: ignore[no-untyped-call]
    pipeline.fit(texts, letters)
    return list(map(str, pipeline.predict(asked)))
