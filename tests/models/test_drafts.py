"""Guesses of how an answer goes on, learnt from other answers."""

import json
from pathlib import Path

import pytest

from distillery.errors import ModelError
from distillery.models import drafts
from distillery.models.drafts import FILE, LEAST_SHARE, Drafts, following, learn_drafts, read_drafts
from distillery.models.onnx_folder import CONFIG

ANSWERS = [[5, 6, 7, 8], [5, 6, 7, 1], [5, 6, 7, 1, 4], [3, 6, 7, 8]]


def learnt_from(answers: list[list[int]]) -> Drafts:
    """Each answer is that of a row of its own."""
    return learn_drafts(enumerate(answers))


def test_the_likeliest_tokens_are_guessed_from_the_longest_context_that_is_known() -> None:
    learnt = learnt_from(ANSWERS)
    assert learnt.guess([], 9) == [5, 6, 7]
    assert learnt.guess([], 2) == [5, 6]
    assert learnt.guess([5], 9) == [6, 7, 1]
    # After 6 7, 1 and 8 are as frequent; after 5 6 7, 1 is the likelier one.
    assert learnt.guess([5, 6, 7], 9) == [1]
    assert learnt.guess([2, 2, 6], 9) == [7, 1]
    assert learnt.guess([1, 2, 99], 9) == []


def test_guesses_end_where_they_are_no_longer_likely() -> None:
    learnt = learnt_from(ANSWERS)
    shares = [learnt.likeliest[key][1] for key in ("-1 -1 -1", "-1 -1 5", "-1 5 6")]
    assert shares == [0.6, 0.75, 0.75]
    sure = 1.0
    for share in (*shares, learnt.likeliest["5 6 7"][1]):
        sure *= share
    assert shares[0] * shares[1] * shares[2] >= LEAST_SHARE > sure
    assert len(learnt.guess([], 9)) == 3


def test_what_no_answer_tells_is_copied_from_the_prompt() -> None:
    learnt, prompt = learnt_from(ANSWERS), following([6, 1, 90, 91, 92, 6, 2, 90, 93])
    # After 6, the answers tell more than the prompt.
    assert learnt.guess([6], 1, prompt) == [7]
    assert learnt.guess([90], 1, prompt) == [93]
    assert learnt.guess([1, 90], 3, prompt) == [91, 92, 6]
    assert learnt.guess([1, 90], 3) == []
    assert following([4]) == {}


def test_an_answer_s_end_is_not_guessed() -> None:
    assert learnt_from([[5, 6], [5, 6], [4, 6], [7, 6]]).guess([5], 9) == []


def test_nothing_is_kept_that_a_single_answer_says(tmp_path: Path) -> None:
    """Also where several rows have that answer."""
    secret = [11, 12, 13, 14]
    learnt = learnt_from([*ANSWERS, secret, secret])
    assert learnt == learnt_from([*ANSWERS, secret])
    # Nor what several answers to one row say, or one says twice.
    rows = [*enumerate(ANSWERS), ("one", secret), ("one", [4, 11, 12, 13, 14, 4, 11, 12, 13, 14])]
    assert not {"12", "13", "14"} & set(" ".join(learn_drafts(rows).likeliest).split())
    learnt.write(tmp_path)
    assert not {"12", "13", "14"} & set((tmp_path / FILE).read_text().replace('"', " ").split())


def test_no_more_than_so_many_tokens_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MOST_TOKENS", 9)
    assert learnt_from(ANSWERS) == learnt_from(ANSWERS[:2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of an exported model of nine tokens."""
    (tmp_path / CONFIG).write_text(json.dumps({"model": {"vocab_size": 9}}))
    return tmp_path


def test_drafts_come_back_from_their_file_byte_for_byte_the_same(folder: Path) -> None:
    assert read_drafts(folder) is None
    learnt = learnt_from(ANSWERS)
    learnt.write(folder)
    assert read_drafts(folder) == learnt
    before = (folder / FILE).read_bytes()
    learnt_from(ANSWERS[::-1]).write(folder)
    assert (folder / FILE).read_bytes() == before
    Drafts(likeliest={}).write(folder)
    assert read_drafts(folder) == Drafts(likeliest={})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"likeliest": {"5": ["a", 1]}})])
def test_a_file_of_another_form_is_refused(text: str, folder: Path) -> None:
    (folder / FILE).write_text(text)
    with pytest.raises(ModelError, match=r"drafts\.json: no drafts of answers; export"):
        read_drafts(folder)


@pytest.mark.parametrize("token", [-1, 9])
def test_tokens_that_the_model_does_not_have_are_refused(token: int, folder: Path) -> None:
    Drafts(likeliest={"5": (token, 0.9)}).write(folder)
    with pytest.raises(ModelError, match="tokens that the model does not have"):
        read_drafts(folder)
