"""Find stop texts in an answer that comes in pieces, in time that grows with the answer alone."""

from collections.abc import Sequence


class StopText:
    """Follows one stop text through an answer, character by character (Knuth, Morris and Pratt,
    Fast pattern matching in strings, SIAM Journal on Computing 6, 1977). `matched`: how many of its
    characters the answer ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # Of each beginning of the text, the longest shorter one that it ends with.
        self._shorter = [0] * len(text)
        for index in range(1, len(text)):
            self._shorter[index] = self._extend(self._shorter[index - 1], text[index])

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)

    def follow(self, character: str) -> bool:
        """Take the answer's next character; return whether the stop text is complete."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.text)


class StopSearch:
    """The stop texts of a request, and the text that may begin one and is therefore held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [StopText(stop) for stop in stops]
        self.held = ""
        self.found = False

    def take(self, piece: str) -> str:
        """Take the answer's next piece; return the text that is final. It ends before the first
        stop text that is complete, and then `found` is true."""
        if not self._stops:
            return piece
        text = self.held + piece
        for index in range(len(self.held), len(text)):
            complete = [len(stop.text) for stop in self._stops if stop.follow(text[index])]
            if complete:
                self.found, self.held = True, ""
                return text[: index + 1 - max(complete)]
        final = len(text) - max(stop.matched for stop in self._stops)
        self.held = text[final:]
        return text[:final]
