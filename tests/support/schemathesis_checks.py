"""A check of schemathesis, which loads this file by SCHEMATHESIS_HOOKS."""

from typing import Any

import schemathesis
from schemathesis.checks import CheckContext
from schemathesis.specs.openapi.checks import positive_data_acceptance


@schemathesis.check
def accepts_what_its_document_allows(
    context: CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> bool | None:
    """Fail for a refused request that the document allows. That a prompt is longer than the context
    is what the document can't say."""
    if b'"context_length_exceeded"' in response.content:
        return None
    return positive_data_acceptance(context, response, case)
