"""What a model must beat: the most frequent answer, and classifiers of words. Where answers are
written, these are the answers of written_baselines.py.

TFIDF learns from all that the student has learnt from: the teacher's letters of the train rows, and
the gold rows if the student learns from these too. So a student that is better owes it to its
weights, not to more rows. TFIDF_ON_GOLD learns from the gold rows alone: what could be had without
a teacher.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from distillery.evaluation.scoring import Answers
from distillery.evaluation.written_baselines import DICTIONARY, NEAREST, written_baselines
from distillery.records import Example
from distillery.training.second_opinion import word_classifier

MAJORITY = "majority class"
TFIDF = "TF-IDF + logistic regression"
TFIDF_ON_GOLD = "TF-IDF on gold rows"
BASELINES = (MAJORITY, TFIDF, TFIDF_ON_GOLD, NEAREST, DICTIONARY)


def with_letters(examples: Sequence[Example], letters: Mapping[str, str]) -> list[Example]:
    """Return the rows that `letters` has a label for, by example_id, with it as their answer."""
    labelled = []
    for example in examples:
        letter = letters.get(example.example_id)
        if letter is not None:
            labelled.append(example.model_copy(update={"answer_key": letter}))
    return labelled


def score_baselines(
    examples: Sequence[Example], learnt: Sequence[Example], gold: Sequence[Example] = ()
) -> tuple[dict[str, Answers], list[str]]:
    """Return the baselines' answers to `examples` by name, and a note on each that is left out.

    `learnt` are all rows that the student has learnt from, with the letters that it has learnt, and
    `gold` the gold rows. Rows without an answer are passed over."""
    answers: dict[str, Answers] = {}
    notes = []
    learnt_rows = answered(learnt)
    gold_rows = answered(gold)
    if examples and examples[0].format is not None:
        return written_baselines(examples, learnt_rows, gold_rows, examples[0].format.json_schema)
    if learnt_rows:
        letters = Counter(example.answer_key for example in learnt_rows)
        answers[MAJORITY] = [letters.most_common(1)[0][0]] * len(examples)
    else:
        notes.append(f"{MAJORITY} is left out: there is no answered row to learn from.")
    for name, rows in ((TFIDF, learnt_rows), (TFIDF_ON_GOLD, gold_rows)):
        if name == TFIDF_ON_GOLD and not rows:
            continue
        reason = hindrance(rows, examples)
        if reason:
            notes.append(f"{name} is left out: {reason}.")
        else:
            answers[name] = classify_words(rows, [example.question for example in examples])
    return answers, notes


def answered(examples: Sequence[Example]) -> list[Example]:
    """Return the rows that have an answer."""
    return [example for example in examples if example.answer_key]


def hindrance(rows: Sequence[Example], asked: Sequence[Example]) -> str | None:
    """Return why letters can't be learnt from the texts of `rows`, or None."""
    if not rows:
        return "there is no answered row to learn from"
    if len({example.choices for example in (*rows, *asked)}) > 1:
        return "the options differ from row to row, so that letters are no classes"
    if len({example.answer_key for example in rows}) == 1:
        return "all rows to learn from have one answer"
    return None


def shares_of_words(
    rows: Sequence[Example], asked: Sequence[Example]
) -> list[tuple[float, ...] | None]:
    """Learn the answers of `rows` as `classify_words` does, and return for each row that is asked
    the probabilities of its options."""
    classifier = word_classifier(10)
    classifier.fit([row.question for row in rows], [row.answer_key for row in rows])
    shares = classifier.predict_proba([row.question for row in asked])
    names = list(map(str, classifier.classes_))
    found: list[tuple[float, ...] | None] = []
    for row, known in zip(asked, shares.tolist(), strict=True):
        by_name = dict(zip(names, known, strict=True))
        found.append(tuple(by_name.get(key, 0.0) for key in row.keys))
    return found


def classify_words(rows: Sequence[Example], asked: Sequence[str]) -> list[str]:
    """Learn the letters of the rows' questions and return a letter for each text that is asked.

    Logistic regression (C = 10) over words and pairs of words, with sublinear term frequencies."""
    classifier = word_classifier(10)
    classifier.fit([row.question for row in rows], [row.answer_key for row in rows])
    return list(map(str, classifier.predict(asked)))
