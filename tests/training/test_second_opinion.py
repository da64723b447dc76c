"""What words say of a teacher's labels."""

import random

import pytest

from distillery.records import Example, TeacherLabel
from distillery.training.decisions import kept_decisions
from distillery.training.second_opinion import with_second_opinion

CLASSES = ("bakery", "bank", "weather")
WORDS = {"bakery": "bread oven crust", "bank": "loan account card", "weather": "rain wind cloud"}


def rows(count: int) -> tuple[list[Example], dict[str, str]]:
    """Texts with two words of their class among others, and the class of each."""
    draw, examples, truth = random.Random(0), [], {}
    for number in range(count):
        name = CLASSES[number % 3]
        said = [
            *draw.sample(WORDS[name].split(), 2),
            *draw.sample(["a", "b", "c", "d", "e", "f", "g", "h"], 3),
        ]
        draw.shuffle(said)
        key = str(number)
        examples.append(Example(example_id=key, question=" ".join(said), classes=CLASSES))
        truth[key] = name
    return examples, truth


def label_of(key: str, answer: str, surety: float) -> TeacherLabel:
    shares = dict.fromkeys(CLASSES, (1 - surety) / 2) | {answer: surety}
    return TeacherLabel(example_id=key, answer=answer, distribution=shares, confidence=surety)


def test_errors_that_no_word_explains_are_mended() -> None:
    examples, truth = rows(150)
    labels, wrong = {}, set()
    for number, (key, name) in enumerate(truth.items()):
        if number % 7 == 0:
            wrong.add(key)
            name = CLASSES[(CLASSES.index(name) + 1) % 3]
        labels[key] = label_of(key, name, 0.5)
    with kept_decisions() as decisions:
        found = with_second_opinion(examples, labels)
    right = sum(found[key].answer == truth[key] for key in truth)
    assert right > 145 > 150 - len(wrong)
    (decision,) = decisions
    assert decision.startswith(f"{sum(found[k].answer != labels[k].answer for k in truth)} of 150 ")
    for label in found.values():
        assert label.distribution is not None
        assert sum(label.distribution.values()) == pytest.approx(1)
        assert label.confidence == max(label.distribution.values())
        assert label.distribution[label.answer] == label.confidence


@pytest.mark.parametrize("text", ["the same words", "a b c", "!"])
def test_a_teacher_that_is_sure_keeps_its_labels_where_words_tell_nothing(text: str) -> None:
    examples, truth = rows(60)
    same = [example.model_copy(update={"question": text}) for example in examples]
    labels = {key: label_of(key, name, 0.9) for key, name in truth.items()}
    found = with_second_opinion(same, labels)
    assert {key: label.answer for key, label in found.items()} == truth


@pytest.mark.parametrize("count", [4, 30])
def test_what_words_cant_judge_stays_as_it_is(count: int) -> None:
    examples, truth = rows(count)
    one_class = {key: label_of(key, "bank", 0.9) for key in truth}
    assert with_second_opinion(examples, one_class) == one_class
    without = {key: TeacherLabel(example_id=key, answer=name) for key, name in truth.items()}
    assert with_second_opinion(examples, without) == without
    assert with_second_opinion(examples, {}) == {}
    few = {key: label_of(key, name, 0.9) for key, name in list(truth.items())[:4]}
    assert with_second_opinion(examples, few) == few
