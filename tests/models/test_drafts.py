"""Guesses of how an answer goes on, learnt from other answers."""

import json
from pathlib import Path

import pytest

from distillery.errors import ModelError
from distillery.models import drafts
from distillery.models.drafts import FILE, LEAST_SHARE, Drafts, following, learn_drafts, read_drafts

ANSWERS = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 9, 4], [3, 6, 7, 8]]


def test_the_likeliest_tokens_are_guessed_from_the_longest_context_that_is_known() -> None:
    learnt = learn_drafts(ANSWERS)
    assert learnt.guess([], 9) == [5, 6, 7]
    assert learnt.guess([], 2) == [5, 6]
    assert learnt.guess([5], 9) == [6, 7, 9]
    # After 6 7, 8 and 9 are as frequent; after 5 6 7, 9 is the likelier one.
    assert learnt.guess([5, 6, 7], 9) == [9]
    assert learnt.guess([1, 2, 6], 9) == [7, 8]
    assert learnt.guess([1, 2, 99], 9) == []


def test_guesses_end_where_they_are_no_longer_likely() -> None:
    learnt = learn_drafts(ANSWERS)
    shares = [learnt.likeliest[key][1] for key in ("-1 -1 -1", "-1 -1 5", "-1 5 6")]
    assert shares == [0.6, 0.75, 0.75]
    sure = 1.0
    for share in (*shares, learnt.likeliest["5 6 7"][1]):
        sure *= share
    assert shares[0] * shares[1] * shares[2] >= LEAST_SHARE > sure
    assert len(learnt.guess([], 9)) == 3


def test_what_no_answer_tells_is_copied_from_the_prompt() -> None:
    learnt, prompt = learn_drafts(ANSWERS), following([6, 1, 90, 91, 92, 6, 2, 90, 93])
    # After 6, the answers tell more than the prompt.
    assert learnt.guess([6], 1, prompt) == [7]
    assert learnt.guess([90], 1, prompt) == [93]
    assert learnt.guess([1, 90], 3, prompt) == [91, 92, 6]
    assert learnt.guess([1, 90], 3) == []
    assert following([4]) == {}


def test_an_answer_s_end_is_not_guessed() -> None:
    assert learn_drafts([[5, 6], [5, 6], [4, 6], [7, 6]]).guess([5], 9) == []


def test_nothing_is_kept_that_a_single_answer_says(tmp_path: Path) -> None:
    """Also where several rows have that answer."""
    secret = [11, 12, 13, 14]
    learnt = learn_drafts([*ANSWERS, secret, secret])
    assert learnt == learn_drafts([*ANSWERS, secret])
    learnt.write(tmp_path)
    assert not {"12", "13", "14"} & set((tmp_path / FILE).read_text().replace('"', " ").split())


def test_no_more_than_so_many_tokens_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "MOST_TOKENS", 9)
    assert learn_drafts(ANSWERS) == learn_drafts(ANSWERS[:2])


def test_drafts_come_back_from_their_file_byte_for_byte_the_same(tmp_path: Path) -> None:
    assert read_drafts(tmp_path, 10) is None
    learnt = learn_drafts(ANSWERS)
    learnt.write(tmp_path)
    assert read_drafts(tmp_path, 10) == learnt
    before = (tmp_path / FILE).read_bytes()
    learn_drafts(ANSWERS[::-1]).write(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    Drafts(likeliest={}).write(tmp_path)
    assert read_drafts(tmp_path, 10) == Drafts(likeliest={})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"likeliest": {"5": ["a", 1]}})])
def test_a_file_of_another_form_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=r"drafts\.json: no drafts of answers; export"):
        read_drafts(tmp_path, 10)


@pytest.mark.parametrize("token", [-1, 9])
def test_tokens_that_the_model_does_not_have_are_refused(token: int, tmp_path: Path) -> None:
    Drafts(likeliest={"5": (token, 0.9)}).write(tmp_path)
    with pytest.raises(ModelError, match="tokens that the model does not know"):
        read_drafts(tmp_path, 9)
