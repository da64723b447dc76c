"""What could be printed of an exception."""

import traceback


def exception_text(error: BaseException | None) -> str:
    """Return all that a handler could print of an exception and of those behind it."""
    texts = []
    while error:
        texts += [str(error), repr(error), repr(vars(error))]
        texts += traceback.format_exception(error)
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
