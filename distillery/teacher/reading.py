"""Reading what a teacher's text answers: one option, or none.

A text or JSON value that is an option as it stands is the answer. Any other text is read in three
steps. `plain` removes what only decorates it: thinking, Markdown, LaTeX,
JSON, and what a base model writes after its answer. `Reader.statements` finds the places that
commit to an answer: after a mark such as "the answer is", before "is correct", or at the start.
`Reader.read` returns the option that all of these name, unless one names several, the clause before
it denies it, or what follows hedges, takes it back, or speaks for another option.

A wrong label costs more than a lost one, so that whatever is in doubt gives None.
tests/teacher/test_reading.py measures precision and recall.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distillery.answers import canonical
from distillery.records import LETTERS

ANSWER_KEYS = {"answer", "finalanswer", "correctanswer", "choice", "option", "letter"}
"""The keys of a JSON object that may hold an answer, in small letters and without separators."""

MOST_LEAD_INS = 10

CLAUSE_CHARACTERS = 300
"""How far back the clause before an answer is looked at."""

_OBJECT = re.compile(r"\{[^{}]*\}")
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_FORMULA = re.compile(r"\$|\\[()\[\]]")
_EMPHASIS = re.compile(r"[*`]|__|^[ \t]*(?:[#>•-]+[ \t]+)+", re.MULTILINE)
_LONG_GAP = re.compile(r"\s{20,}")
_FENCED = re.compile(r"```\w*\s(.*)\s```", re.DOTALL)
_FENCE = re.compile(r"^```\w*[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_ROLE = re.compile(
    r"^\s*(?:<\|[^|<>]*\|>\s*)*(?:(?:assistant|response)[ \t]*[:：\n])?\s*", re.IGNORECASE
)
_END = re.compile(
    r"<\|[^|<>]*\|>|</s>|(?<=\S)\s*\n\s*(?:question|q)\s*\d*\s*[:.](?=\s)", re.IGNORECASE
)
"""Where an answer ends: at a special token, or at the next question, which a base model invents."""

_MARK = re.compile(
    r"""
    \b(?:answer|ans|choice|option)\b
      (?:\s+(?:here|(?:to|for|among|of|in)\s[^.:;!?\n]{1,60}?))?
      (?: \.?\s*[:：=] | \s+[-–—](?=\s) | [ \t]*(?=\n) | \s*\.(?=\s*[(\[])
        | \s+(?:is|would\s+be|should\s+be|must\s+be|has\s+to\s+be|will\s+be)\b )
    | ^[ \t]*(?:final\s+)?answer\s+(?=(?-i:[(\[]?[A-Z][)\]]?\s*(?:[.:]|$)))
    | \b(?:respuesta|resposta|r[ée]ponse|antwort|risposta|ответ)\b(?:\s+(?:correcta|correta))?
      (?: \s*[:：] | \s+(?:es|est|ist|è|é)\b )
    | (?:答案|回答|正解|정답)\s*[:：是は为]
    | \bI(?:['’](?:d|ll|m)|\s+(?:would|will|am|must))?
      \s+(?:choose|pick|select|say|meant|go(?:ing)?\s+(?:with|for)|opt\s+for)\b
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""What stands before an answer: "Answer:", "the best choice would be", "I'd go with"."""

_MOST = r"""most\s+(?:likely|probable|plausible|appropriate|suitable|fitting|logical|reasonable|
    sensible|accurate|relevant)"""
"""Not "the most obvious": what follows may be a common mistake."""

_WEAK_MARK = re.compile(
    rf"""
    (?: ^ | [.!?;:,\n] | \b(?:but|so|and|then|think|believe|therefore|thus|hence) ) \s{{0,20}}
      (?: it(?:['’]s|\s+is|\s+must\s+be) | that(?:['’]s|\s+is|\s+would\s+be|\s+leaves)
        | this\s+(?:is|leaves) )\b
    | (?: ^ | [.!?\n] ) \s{{0,20}} (?:so|therefore|thus|hence)\b \s*[,:]?
    | \b(?:best|correct|right|{_MOST})\b[^.;:!?\n]{{0,40}}?\b(?:is|would\s+be)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What stands before an answer where nothing else in the text is one, and before a letter only:
"It's", "That leaves", "Therefore"."""

_IS_RIGHT = re.compile(
    rf"""
    (?<=\S)\s+is\s+(?:clearly\s+|therefore\s+|thus\s+)?
    (?: correct | right
      | the\s+(?:(?:correct|right|best|only|final|{_MOST})\s+){{0,2}}(?:answer|choice|option) )
    (?= \s*$ | [ \t]*\n | [ \t]*[.!:;)"'”] | ,?\s+(?:because|since|as|for|here|given|among|of|due)\b
      | ,\s+(?!but|though|although|yet|except|if|unless|only|or|and)\w )
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What stands after an answer: "is the best choice"."""

_LETTER_BEFORE = re.compile(
    r"(?:^|[.!?;:,\n]|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter|[Tt]hat|[Tt]hink|[Bb]elieve|"
    r"[Ss]o|[Bb]ut|[Tt]hus|[Hh]ence|[Tt]herefore))\s*[(\[\"]?([A-Z])[)\]\"]?"
    r"(?:,\s[^.;:!?\n]{1,60},|\s?\([^()\n]{1,80}\))?$"
)

_NOT_THE_ANSWER = re.compile(
    r"\b(?:wrong|incorrect|worst|least\s+\w+|each|every|one|another|other|obvious|popular|proposed|"
    r"suggested|given|claimed|opposite\s+of\s+(?:the|my)|possible|second|first|plausible|"
    r"alternative|tempting|common|bad|poor|not\s+(?:the|a)(?:\s+\w+)?)[\s-]+(?:\w+\s+)?$",
    re.IGNORECASE,
)
"""What stands before "answer" where something else than the answer follows."""

_NEGATED = (
    r"(?:\b(?:not|cannot|no|never|hardly|nor|neither|nobody|nothing|none|without)\b|n['’]t\b)"
)

_NOT_STATED = re.compile(
    r"\b(?:if|unless)\b|\b(?:might|may|could)\s+(?:\w+\s+)?(?:think|say|assume|argue|guess|believe|"
    r"expect|be)\b|\b(?:first|initially|tempting|tempted|doubt|unlikely|opposite)\b|thing\s+but\b"
    rf"|{_NEGATED}\s+(?:think|believe|say|mean|sure|certain|true|clear)\b"
    rf"|(?:{_NEGATED}|\b(?:false|wrong|deny|rejects?|improbable|impossible)\b)[^,:]*$",
    re.IGNORECASE,
)
"""What stands in a clause whose answer its author doesn't give: "One might think the answer is"."""

_SENTENCE = re.compile(r"[.!?;\n]")

_CLAUSE = re.compile(
    r"[.!?;\n]|\b(?:(?<!thing )but|so|therefore|however|thus|hence|then)\b", re.IGNORECASE
)

_TAKEN_BACK = re.compile(
    r"(?:[.!?;:,(\n]|--|[-–—]>?)\s{0,20}(?:(?:oh|but|no|ah|or|hmm),?\s+)?"
    r"(?:(?:wait|sorry|hmm|correction)\s*(?:[,.!:;…–—-]|$|\bno\b)|actually\b(?!\s*\w+ing))"
    r"|\bscratch\s+that\b|\bi\s+meant\b|\bsecond\s+thoughts?\b|\breconsider\b|\bon\s+reflection\b"
    r"|\b(?:a|my)\s+mistake\b|\bmistaken\b"
    r"|\b(?:this|that|it)(?:['’]s|\s+(?:is|was))\s+(?:wrong|incorrect|false|not\s+(?:right|correct|true))"
    r"|\bthis\s+fails\b|\bbut\s+(?:wrong|incorrect|false|not\s+(?:right|correct|true))\b"
    r"|(?:[.!?;\n]|--|[-–—]>?)\s{0,20}no\s*(?:[.!;:]|$|,\s*(?:that|this|it|the|not|i|wait|sorry)\b)",
    re.IGNORECASE,
)
"""What takes back the answers before it. "Wait" and "no" may also begin a reason."""

_HEDGE = re.compile(
    r"\b(?:not|n['’]t)\s+(?:\w+\s+)?(?:sure|certain)\b|\bunsure\b|\buncertain\b"
    r"|\bcan(?:not|['’]t)\s+(?:say|tell|be\s+certain|be\s+sure|determine)\b"
    r"|\b(?:may|might|could)\s+(?:be\s+wrong|well\s+be)\b"
    r"|\b(?:also|equally)\s+(?:be\s+)?(?:possible|plausible|correct|right|work|good|valid)\b"
    r"|\bas\s+(?:plausible|likely)\b|\bhard\s+to\s+say\b|\bit\s+depends\b"
    r"|\bor\s+(?:possibly|maybe|perhaps)\b",
    re.IGNORECASE,
)

_CONDITION = re.compile(
    r"[)\]\"'”’]*,?\s*(?:[(\[]\s*)?(?:if|unless|assuming|provided|depending)\b", re.IGNORECASE
)
"""What stands right behind an answer that holds only sometimes."""

_FURTHER = re.compile(
    r"\b(?:or|and\s+also|also|alternatively|though|although|but|yet|however|maybe|perhaps|possibly|"
    r"instead|rather(?!\s+than)|(?:could|might|may|should|must|would)\s+(?:\w+\s+)?be)\b[\s,:(\[]{0,20}"
    r"|[(\[]and\b\s{0,20}|[→.!?;\n–—-]>?\s{0,20}no,\s{0,20}",
    re.IGNORECASE,
)
"""What stands before a further option that the text speaks for."""

_FITS_TOO = re.compile(
    r"(?<=\S)\s+(?:(?:is|are|would|could|may|might|can|seems?|looks?)\s+)?(?:be\s+)?"
    r"(?:too(?=[ \t]*(?:[.,;!)\n]|$))|(?:also|better|best|fine|right|correct|possible|plausible|"
    r"likely|equally|just\s+as|as\s+(?:good|well)|fits?|works?)\b"
    r"(?!\s+(?:less|worse|only|poorly|badly|not|no)\b))",
    re.IGNORECASE,
)
"""What stands behind a further option that the text speaks for."""

_NEGATION = re.compile(rf"{_NEGATED}|\b(?:than|unlike|instead\s+of)\b", re.IGNORECASE)

_LEAD_IN = re.compile(
    r"[\s:：\"'“”‘’„«]+|answer\s*:|(?:most\s+likely|most\s+probably|probably|likely|definitely|"
    r"clearly|certainly|simply|therefore|thus|hence|indeed|then|(?:the\s+)?(?:option|choice|letter))\b",
    re.IGNORECASE,
)
"""What may stand between a mark and an answer."""

_QUOTES = re.compile(r"[\s\"'“”‘’„«(\[]*")

_ARTICLE = re.compile(r"(?:(?:in|at|on|to)\s+)?(?:(?:the|an?)\s+)?", re.IGNORECASE)

_LETTER = re.compile(r"([(\[<{])?([A-Za-z])([)\]>}])?(?![A-Za-z0-9'’+#À-ɏ]|-\w)")

_REASON = r"(?:because|since|as|for|due|given|which|where)\b"

_AFTER_LETTER = re.compile(
    rf"\s*$|[ \t]*\n|[ \t]*[^\s\w]|[ \t]+(?:{_REASON}|(?:and|or)\b)|[^\x00-ɏ]"
)

_AFTER_TEXT = re.compile(
    rf"[\"'”’»]*(?:\s*$|[ \t]*\n|[.,;:!?](?!\d)|[^\x00-ɏ]|[ \t]*[)\]}}(/&+]|\s+[-–—]\s"
    rf"|\s+(?:{_REASON}|(?:and|or)\b))",
    re.IGNORECASE,
)

_BETWEEN = re.compile(r"[ \t]*[)\]>}\"'”’.,:;=–—→-]*>?[ \t]*[\"'“‘(]*")
"""What may stand between a letter and its option's text."""

_ALTERNATIVE = re.compile(
    r"[)\]>}\"'”’]*(?:\.{2,}|…)?\s*(?:(?:,\s*)?(?:and/or|or|and|but\s+also|und|oder|ou)\b|[/&+])"
    r"\s*(?:(?:possibly|maybe|perhaps|even|also|both)\b)?",
    re.IGNORECASE,
)
_LISTED = re.compile(
    r"[)\]>}\"'”’]{0,4}(?:\s*[,.;:|>→–—-]{1,4}\s*|[ \t]+(?=[(\[]))[(\[]?([A-Z])[)\]]?"
    r"(?=\s*(?:[,.;)\]|]|$|\n|(?:and|or)\b))"
)
"""A further letter right behind an answer: "A, B", "A. B", "(A) first option (B)"."""

_DENIED = re.compile(
    r"[)\]\"'”’]{0,4}(?:\s*(?:[:;.–—-]{1,4}\s*)?(?:not|wrong|incorrect|false|no(?=\s*(?:[,.;!]|$)))\b"
    r"|[.,:]?\s*(?:is|are|was|has|does|would|can|seems|looks)\s*(?:n['’]t|not\b|wrong|incorrect|"
    r"too\b|unlikely|impossible|out\b))",
    re.IGNORECASE,
)
_VERB = re.compile(
    r",?\s+(?:is|are|was|were|has|have|does|do|can|could|would|will|may|might|must|seems|looks)\b",
    re.IGNORECASE,
)
_LETTER_LINE = re.compile(r"^[ \t(\[\"'“]*([A-Z])[)\]\"'”.: \t]*$", re.MULTILINE)
_ENUMERATED = re.compile(
    r"(?:^|[.,;!?]\s)[ \t]*(?:option\s+)?[(\[]?([A-Z])(?:[)\].:,=]|\s[–—=-]\s|[ \t]*$)",
    re.MULTILINE,
)


SHORT = 100
"""The most characters of a text whose reading is kept."""

READINGS = 4096
"""How many are kept."""


def parse_answer(text: str, choices: Sequence[str], cut_off: bool = False) -> str | None:
    """Return the letter that `text` answers with, or None if it names no option or several.

    `choices` are the texts of the options as they were shown. An answer is a letter, an option's
    text or both, in any of the forms that the module's docstring names, whatever other options the
    text discusses. Everything up to </think> is ignored. `cut_off`: whether the text ends where
    its author didn't end it; then it must begin with its answer.
    """
    return read_choice(text, tuple(choices), cut_off, by_letter=True)


def parse_class(text: str, classes: Sequence[str], cut_off: bool = False) -> str | None:
    """Return the class that `text` answers with, or None if it names none or several.

    It is read as `parse_answer` reads the text of an option: without regard to case, quotes and
    emphasis, unless case tells two classes apart."""
    return read_choice(text, tuple(classes), cut_off, by_letter=False)


def read_choice(text: str, names: tuple[str, ...], cut_off: bool, by_letter: bool) -> str | None:
    """Return the letter, or else the one of `names`, that `text` answers with. Most answers are a
    few short texts, again and again, whose readings are kept."""
    read = read_short_choice if len(text) <= SHORT else read_any_choice
    return read(text, names, cut_off, by_letter)


def read_any_choice(
    text: str, names: tuple[str, ...], cut_off: bool, by_letter: bool
) -> str | None:
    choices = dict(zip(LETTERS if by_letter else names, names, strict=False))
    return Reader(choices, by_letter).read(text, cut_off)


read_short_choice = lru_cache(READINGS)(read_any_choice)


def written_answer(text: str, schema: Mapping[str, Any] | None) -> str:
    """Return the answer that a text is, after any thinking; with a schema, its JSON object, which
    may stand in a fence of Markdown with words around it. Raises answers.NotAnAnswer."""
    body = after_thinking(text)
    if schema is not None:
        start, end = object_span(body)
        body = body[start:end]
    return canonical(body, schema)


def object_span(body: str) -> tuple[int, int]:
    """Return where the JSON object of an answer begins and ends: in the only fence of Markdown if
    the answer begins with other words, else all of the answer; without blanks around it."""
    start, end = 0, len(body)
    if not body.startswith("{"):
        fenced = list(_FENCE.finditer(body))
        # Of several, none is known to be the answer.
        if len(fenced) == 1:
            start, end = fenced[0].span(1)
    inner = body[start:end]
    start += len(inner) - len(inner.lstrip())
    return start, start + len(inner.strip())


def rationale_of(text: str, options: Sequence[str], by_letter: bool) -> str:
    """Return what precedes the last statement of the answer, without any thinking. `options`: the
    texts of the options as they were shown or, without `by_letter`, the classes."""
    keys = LETTERS if by_letter else options
    lines = without_role(text).splitlines()
    body = plain("\n".join(lines))
    statements = Reader(dict(zip(keys, options, strict=False)), by_letter).statements(body)
    if not statements:
        return ""
    earlier, _, line = body[: statements[-1].start].rpartition("\n")
    kept = lines[: earlier.count("\n") + 1] if earlier else []
    sentences = re.match(r".*[.!?](?=\s|$)", line)
    if sentences:
        kept.append(sentences[0])
    return "\n".join(kept).strip()


def after_thinking(text: str) -> str:
    """Return what follows the last </think>, or all of `text`; nothing where thinking was cut
    off."""
    body = text.rpartition("</think>")[2].strip()
    return "" if body.startswith("<think>") else body


def without_role(text: str) -> str:
    """Return what follows the thinking, without "Assistant:" and without long gaps, which take
    some patterns the square of their length."""
    body = _LONG_GAP.sub(lambda gap: "\n\n" if "\n" in gap[0] else " ", after_thinking(text))
    return _ROLE.sub("", body)


def answer_values(text: str) -> list[str]:
    """Return a text as it stands and what it is as JSON: a value, or the answers in an object."""
    fenced = _FENCED.fullmatch(text)
    value = json_value(fenced[1] if fenced else text)
    if isinstance(value, dict):
        return [str(answer) for key, answer in value.items() if is_answer_key(key)]
    if isinstance(value, str | int | float):
        return [text, str(value)]
    return [text]


def is_answer_key(key: str) -> bool:
    """Return whether a JSON object's key may hold an answer."""
    return re.sub(r"[\s_-]", "", key).casefold() in ANSWER_KEYS


def plain(text: str) -> str:
    """Return `text` in as many lines, without Markdown, LaTeX, JSON and special tokens, and without
    what follows its answer. A JSON object and a box become "Answer: ...;"."""
    text = with_objects_as_marks(text)
    end = _END.search(text)
    if end:
        text = text[: end.start()]
    text = _FONT.sub(r"\1", text).replace("\\ ", " ")
    text = _FORMULA.sub("", _BOX.sub(r"Answer: \1;", text))
    return re.sub(r"[ \t\xa0]+", " ", without_emphasis(text))


def with_objects_as_marks(text: str) -> str:
    """Return `text` with each JSON object that has an answer as "Answer: ...;"."""

    def as_marks(source: str, value: Any) -> str:
        if not isinstance(value, dict):
            return source
        marks = []
        for key, answer in value.items():
            if is_answer_key(key):
                known = isinstance(answer, str | int | float)
                marks.append(f"Answer: {' '.join(str(answer).split()) if known else '?'};")
        return " ".join(marks) + "\n" * source.count("\n")

    def replaced(found: re.Match[str]) -> str:
        source = found[0]
        value = json_value(source)
        if value is None and '"' not in source:
            value = json_value(source.replace("'", '"'))
        return as_marks(source, value)

    whole = json_value(text)
    if isinstance(whole, dict):
        return as_marks(text, whole)
    return _OBJECT.sub(replaced, text)


def json_value(text: str) -> Any:
    """Return the value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def without_emphasis(text: str) -> str:
    """Return `text` without Markdown's emphasis, headings, quotes and bullets."""
    return _EMPHASIS.sub("", text)


def bare(option: str) -> str:
    """Return an option's text as it is looked for: without emphasis, quotes, a full stop and extra
    spaces."""
    text = _FORMULA.sub("", _FONT.sub(r"\1", without_emphasis(option)))
    return " ".join(text.split()).strip(" \"'“”.")


@dataclass(frozen=True, slots=True)
class Statement:
    """A part of a text, from `start` to `end`, that names the options `keys` as the answer. A weak
    one counts only where no other is found."""

    start: int
    end: int
    keys: frozenset[str]
    weak: bool = False


class Reader:
    """Reads answers to a question. `options`: the text of each key, which is a letter or a class.
    `by_letter`: whether a letter alone names an option, too."""

    def __init__(self, options: Mapping[str, str], by_letter: bool) -> None:
        self._letters = set(options) if by_letter else set()
        self._options = dict(options)
        self._texts: list[tuple[str, str]] = []
        for key, option in options.items():
            text = bare(option)
            article = re.match(r"(?:the|an?)\s+(?=\S)", text, re.IGNORECASE)
            self._texts.append((key, text))
            if article:
                self._texts.append((key, text[article.end() :]))

    def read(self, text: str, cut_off: bool = False) -> str | None:
        """Return the key of the option that `text` names as its answer; None if it names none or
        several, or hedges. `cut_off` as in `parse_answer`."""
        exact = self._exact(after_thinking(text))
        if exact is not None:
            return None if cut_off and self._may_go_on(exact) else exact
        body = plain(without_role(text))
        whole, end = self.text_at(body, 0)
        if len(whole) == 1 and not body[end:].strip(" \n.!\"'”"):
            # An option's text may itself be a hedge: "I don't know".
            letter, _ = self.letter_at(body, 0)
            (key,) = whole
            return None if not letter <= whole or (cut_off and self._may_go_on(key)) else key
        statements = self.statements(body)
        keys: set[str] = set()
        for statement in statements:
            keys |= statement.keys
        if len(keys) != 1:
            return None
        first, last = statements[0], statements[-1]
        begin = max(body.rfind(mark, 0, first.start) for mark in ".!?\n") + 1
        if _HEDGE.search(body, begin, first.start) or _HEDGE.search(body, last.end):
            return None
        if _CONDITION.match(body, last.end) or self._further(body, first.end) - keys:
            return None
        if cut_off and not (first.keys == keys and first.start <= end_of(_QUOTES, body, 0)):
            return None
        return keys.pop()

    def _exact(self, text: str) -> str | None:
        """Return the key of the option that a text or a JSON value is as it stands."""
        values = answer_values(text)
        found = {
            key
            for key, option in self._options.items()
            if option in values or (key in self._letters and key in values)
        }
        return found.pop() if len(found) == 1 else None

    def _may_go_on(self, key: str) -> bool:
        """Return whether another option begins with the text of this one."""
        text = self._options[key].casefold()
        return any(
            other != key and option.casefold().startswith(text)
            for other, option in self._options.items()
        )

    def _further(self, body: str, at: int) -> set[str]:
        """Return the options that a text speaks for from a place on, however guardedly."""
        found: set[str] = set()
        for match in _FURTHER.finditer(body, at):
            keys = self.text_at(body, match.end())[0]
            keys = keys or self.letter_at(body, match.end(), strict=False)[0]
            begin = max(at, match.start() - CLAUSE_CHARACTERS)
            for end in _SENTENCE.finditer(body, begin, match.start()):
                begin = end.end()
            if keys and not _NEGATION.search(body, begin, match.start()):
                found |= keys
        for match in _FITS_TOO.finditer(body, at):
            found |= self._named_before(body, match.start())[0]
        return found

    def statements(self, body: str) -> list[Statement]:
        """Return the statements of the answer in a text without decoration, in their order, and
        without those that are taken back."""
        found = [
            *self._marked(body, _MARK),
            *self._marked(body, _WEAK_MARK, weak=True),
            *self._called_right(body),
            *self._lines_alone(body),
            *self._opening(body),
        ]
        found = [each for each in found if not each.weak] or found
        found.sort(key=lambda statement: statement.start)
        if found:
            for taken_back in _TAKEN_BACK.finditer(body, found[0].end):
                found = [each for each in found if each.start >= taken_back.start()]
        return found

    def _marked(self, body: str, mark: re.Pattern[str], weak: bool = False) -> list[Statement]:
        """Return what stands behind the marks; behind weak ones only letters."""
        found = []
        for match in mark.finditer(body):
            clause = clause_before(body, match.start(), match.end())
            if _NOT_THE_ANSWER.search(clause) or _NOT_STATED.search(clause):
                continue
            keys, end = self.named_at(body, match.end(), texts=not weak)
            if keys:
                found.append(Statement(match.start(), end, keys, weak))
        return found

    def _called_right(self, body: str) -> list[Statement]:
        """Return what is followed by "is correct" or the like."""
        found = []
        for match in _IS_RIGHT.finditer(body):
            keys, start = self._named_before(body, match.start())
            if keys and not _NOT_STATED.search(clause_before(body, start, start)):
                found.append(Statement(start, match.end(), keys))
        return found

    def _named_before(self, body: str, end: int) -> tuple[frozenset[str], int]:
        """Return the options that are named right before a place, and where the name starts."""
        letter = _LETTER_BEFORE.search(body, max(end - CLAUSE_CHARACTERS, 0), end)
        if letter and letter[1] in self._letters:
            return frozenset(letter[1]), letter.start(1)
        return self._text_before(body, end)

    def _text_before(self, body: str, end: int) -> tuple[frozenset[str], int]:
        """Return the options whose text ends at a place, the longest ones, and where it starts."""
        found = []
        for key, text in self._texts:
            start = end - len(text)
            if text and start >= 0 and same(body[start:end], text):
                found.append((start, key))
        start = min(found, default=(end, ""))[0]
        if re.search(r"(?:\w|\b(?:or|and|nor|not)\s+)$", body[max(start - 10, 0) : start]):
            return frozenset(), end
        return frozenset(key for begin, key in found if begin == start), start

    def _opening(self, body: str) -> list[Statement]:
        """Return the answer that a text begins with. There is none if several lines begin with a
        letter: these discuss the options."""
        if self._enumerates(body) or re.match(r"I,", body):
            return []
        start = self._after_lead_ins(body, 0)
        keys, end = self.named_at(body, start)
        behind = end_of(_BETWEEN, body, end)
        for key, text in self._texts:
            if key in keys and same(body[behind : behind + len(text)], text):
                end = behind + len(text)
        if not keys or _DENIED.match(body, end):
            return []
        subject = _VERB.match(body, end) is not None
        if subject and not re.match(r"\(?\w[).:]", body[start:]):
            return []
        by_letter = keys == self.letter_at(body, start)[0]
        if not by_letter and re.match(r":|\s*\(|,\s*(?!(?:not|because|since|as)\b)\w", body[end:]):
            return []
        # A text's first words may be its subject: "Oxygen. It is given off." Two letters are, too.
        return [Statement(start, end, keys, weak=subject or not by_letter or len(keys) > 1)]

    def _enumerates(self, body: str) -> bool:
        """Return whether several lines of a text begin with different letters."""
        return len(set(_ENUMERATED.findall(body)) & self._letters) > 1

    def _lines_alone(self, body: str) -> list[Statement]:
        """Return the letters that are all of a line and, as a weak answer, what is all of the last
        of several lines."""
        found = []
        for line in _LETTER_LINE.finditer(body):
            if line[1] in self._letters:
                found.append(Statement(line.start(1), line.end(1), frozenset(line[1])))
        before, _, last = body.rstrip().rpartition("\n")
        keys, end = self.named_at(last, 0)
        if keys and before and not self._enumerates(body) and not last[end:].strip(" .)]\"'"):
            start = len(before) + 1
            found.append(Statement(start, start + end, keys, weak=True))
        return found

    def named_at(self, body: str, at: int, texts: bool = True) -> tuple[frozenset[str], int]:
        """Return the keys that are named at a place in a text, and where the name ends; several
        keys where the text goes on with a further one. `texts`: whether an option's text names
        it."""
        at = self._after_lead_ins(body, at, texts)
        keys, end = self.text_at(body, at) if texts else (frozenset[str](), at)
        letter, letter_end = self.letter_at(body, at)
        if letter and end - at <= 1:
            keys, end = keys | letter, max(end, letter_end)
        if not keys or re.match(r"[)\]\"'”’]*\s*\?", body[end:]):
            return frozenset(), at
        others: frozenset[str] = frozenset()
        joined = _ALTERNATIVE.match(body, end)
        if joined:
            behind = self._after_lead_ins(body, joined.end())
            others = self.text_at(body, behind)[0] or self.letter_at(body, behind, strict=False)[0]
            if not others and joined[0].strip()[-1:].isalpha():
                # "fish and chips" is not the option "fish".
                return frozenset(), at
        listed = _LISTED.match(body, end)
        if listed:
            others |= {listed[1]} & self._letters
        return keys | others, end

    def _after_lead_ins(self, body: str, at: int, texts: bool = True) -> int:
        """Return where an answer may begin: behind all that leads in, but for an option's text."""
        for _ in range(MOST_LEAD_INS):
            lead_in = _LEAD_IN.match(body, at)
            if not lead_in or (texts and self.text_at(body, at)[0]):
                return at
            at = lead_in.end()
        return at

    def text_at(self, body: str, at: int) -> tuple[frozenset[str], int]:
        """Return the options whose text stands at a place, the longest ones, and where it ends."""
        found: list[tuple[int, bool, str]] = []
        for start in {at, end_of(_ARTICLE, body, at)}:
            for key, text in self._texts:
                end = start + len(text)
                written = body[start:end]
                if text and same(written, text) and _AFTER_TEXT.match(body, end):
                    found.append((end, written == text, key))
        if not found:
            return frozenset(), at
        # Of "order" and "order status" the longer one is written; case tells "Bill" from "bill".
        end, exact, _ = max(found)
        return frozenset(key for *rank, key in found if rank == [end, exact]), end

    def letter_at(self, body: str, at: int, strict: bool = True) -> tuple[frozenset[str], int]:
        """Return the letter that stands at a place, and where it ends, its option's text included;
        two letters if the text is another option's. `strict`: what follows the letter must show
        that it is no word."""
        match = _LETTER.match(body, at)
        if not match or match[2].upper() not in self._letters:
            return frozenset(), at
        letter, end = match[2].upper(), match.end()
        bracketed = match[3] is not None
        if match[2].islower() and not bracketed and not re.match(r"[).:;,\n]|\s*$", body[end:]):
            return frozenset(), at
        behind = end_of(_BETWEEN, body, end)
        text, text_end = self.text_at(body, behind)
        if letter in text:
            return frozenset(letter), text_end
        if strict and not bracketed and not _AFTER_LETTER.match(body, end):
            return frozenset(), at
        # An abbreviation, or the initials of a name.
        if re.match(r"\.\w|\.\s?[A-Z]\.", body[end:]):
            return frozenset(), at
        if text and behind > end:
            return text | {letter}, text_end
        return frozenset(letter), end


def clause_before(body: str, at: int, end: int) -> str:
    """Return the clause that a place is in, up to it; the words up to `end` may begin another."""
    begin = max(at - CLAUSE_CHARACTERS, 0)
    for clause_end in _CLAUSE.finditer(body, begin, end):
        begin = clause_end.end()
    return body[begin:at]


def same(written: str, text: str) -> bool:
    """Return whether two texts are equal but for case."""
    return written.casefold() == text.casefold()


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return where a pattern's match at a place ends; the place itself without a match."""
    match = pattern.match(text, at)
    return match.end() if match else at
