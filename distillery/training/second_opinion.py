"""A second opinion on a teacher's labels, by a classifier of another kind.

A student that starts from its teacher's weights sees in a text what the teacher sees, and so learns
its errors too. TF-IDF with logistic regression sees words alone: it learns from the teacher's
labels what these have in common, but hardly an error that no word explains. Where two views of a
row are that different, each corrects the other (Blum, Mitchell, Combining Labeled and Unlabeled
Data with Co-Training, COLT 1998). Their probabilities are multiplied (a product of experts: Hinton,
Training Products of Experts by Minimizing Contrastive Divergence, 2002), so that the one that is
surer decides, and words that tell nothing change little.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillery.records import Example, TeacherLabel
from distillery.training.decisions import decide
from distillery.training.probing import short_fits

FOLDS = 5

LEAST = 1e-6
"""No probability is below this, so that neither view rules a class out."""


def word_classifier(strength: float) -> Any:
    """Return logistic regression (C = `strength`) over words and pairs of words, with sublinear
    term frequencies, as a scikit-learn pipeline that takes texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)  # type: ignore[no-untyped-call]
    classifier = LogisticRegression(C=strength, max_iter=1000)  # type: ignore[no-untyped-call]
    return make_pipeline(words, classifier)  # type: ignore[no-untyped-call]


def with_second_opinion(
    examples: Sequence[Example], labels: Mapping[str, TeacherLabel]
) -> dict[str, TeacherLabel]:
    """Return the labels by example_id with probabilities, and answers, that words agree with.

    `examples`: rows of a classifier, of which those without a label are passed over. What words say
    of a row was learnt from the other rows' labels. Labels without probabilities stay as they are,
    as do all where there are fewer than 5 rows or one class."""
    rows = []
    for example in examples:
        label = labels.get(example.example_id)
        if label is not None and label.distribution:
            rows.append((example, label, label.distribution))
    answers = [label.answer for _, label, _ in rows]
    changed = dict(labels)
    if len(rows) < FOLDS or len(set(answers)) < 2:
        return changed
    said = probabilities_of_words([example.question for example, _, _ in rows], answers)
    corrected = 0
    for (example, label, distribution), words in zip(rows, said, strict=True):
        product = {}
        for key, share in distribution.items():
            product[key] = max(share, LEAST) * max(words.get(key, 0.0), LEAST)
        total = sum(product.values())
        shares = {key: value / total for key, value in product.items()}
        answer = max(shares, key=shares.__getitem__)
        corrected += answer != label.answer
        changed[example.example_id] = label.model_copy(
            update={"answer": answer, "distribution": shares, "confidence": shares[answer]}
        )
    decide(
        f"{corrected} of {len(rows)} labels are changed by a second opinion: TF-IDF with logistic "
        "regression, which learnt from the other labels (training.second_opinion)"
    )
    return changed


def probabilities_of_words(texts: Sequence[str], answers: Sequence[str]) -> list[dict[str, float]]:
    """Return for each text the probabilities of the answers by a classifier of words that has
    learnt from the texts of other folds; none where these have no words or one answer."""
    from sklearn.model_selection import KFold

    found: list[dict[str, float]] = [{} for _ in texts]
    folds: Any = KFold(FOLDS, shuffle=True, random_state=0)  # type: ignore[no-untyped-call]
    for learnt, asked in folds.split(np.zeros(len(texts))):
        known = [answers[index] for index in learnt]
        if len(set(known)) < 2:
            continue
        # C of 1: where words tell little, its probabilities say so.
        classifier = word_classifier(1.0)
        try:
            with short_fits():
                classifier.fit([texts[index] for index in learnt], known)
        except ValueError:
            # The texts have no words of two letters or more.
            continue
        shares = classifier.predict_proba([texts[index] for index in asked])
        names = list(map(str, classifier.classes_))
        for index, row in zip(asked, shares.tolist(), strict=True):
            found[index] = dict(zip(names, row, strict=True))
    return found
