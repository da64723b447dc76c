"""What the server takes and gives, as an OpenAPI document: made from the types that it uses."""

from typing import Any

from openai.types import Model
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from distillery.serving.requests import ChatRequest

ERRORS = {
    "400": "a request that this server does not take, or that the model can't answer",
    "404": "another model than the one that is served",
    "408": "a request that did not come in time",
    "413": "a request that is too large",
    "415": "a body that is not declared as JSON",
    "421": "a name that is not the server's",
    "429": "too many requests at once; Retry-After says when to come again",
    "500": "the server failed",
    "503": "an answer that took too long, or a server that stops",
}


class ErrorBody(BaseModel):
    error: ErrorObject


class ModelList(BaseModel):
    object: str
    data: list[Model]


class Health(BaseModel):
    status: str


def openapi_document(with_key: bool) -> dict[str, Any]:
    """Return the document. `with_key`: clients must send a key."""
    models = (ChatCompletion, ModelList, Model, Health, ErrorBody)
    answers = [(model, "serialization") for model in models]
    _, schemas = models_json_schema(
        [(ChatRequest, "validation"), *answers],  # type: ignore[list-item]
        ref_template="#/components/schemas/{model}",
    )
    definitions = schemas["$defs"]
    definitions["ChatRequest"]["dependentSchemas"] = {
        "top_logprobs": {
            "anyOf": [
                {"properties": {"top_logprobs": {"type": "null"}}},
                {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
            ]
        }
    }
    chat = operation("chat", "ChatCompletion", list(ERRORS), with_key)
    # OpenAPI 3.1 has no schema for a stream; its events are chunks in OpenAI's form.
    chat["responses"]["200"]["content"]["text/event-stream"] = {}
    chat["requestBody"] = {"required": True, "content": json_of("ChatRequest")}
    one = operation("model", "Model", ["404", "421"], with_key)
    one["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    paths: dict[str, Any] = {
        "/healthz": {"get": operation("health", "Health", ["421"], with_key=False)},
        "/health": {"get": operation("ready", "Health", ["421", "503"], with_key=False)},
    }
    paths |= {
        "/v1/chat/completions": {"post": chat},
        "/v1/models": {"get": operation("models", "ModelList", ["421"], with_key)},
        "/v1/models/{name}": {"get": one},
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Distillery",
            "version": "1",
            "description": "The paths below /v1 are there without /v1 too.",
        },
        "paths": paths,
        "components": {"schemas": definitions},
    }
    if with_key:
        document["components"]["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
        }
    return document


def operation(name: str, answer: str, errors: list[str], with_key: bool) -> dict[str, Any]:
    """Return an operation that answers with the schema `answer`, or with one of `errors`."""
    responses = {"200": {"description": "the answer", "content": json_of(answer)}}
    for status in errors:
        responses[status] = {"description": ERRORS[status], "content": json_of("ErrorBody")}
    found: dict[str, Any] = {"operationId": name, "responses": responses}
    if with_key:
        responses["401"] = {"description": "a wrong key", "content": json_of("ErrorBody")}
        found["security"] = [{"key": []}, {"api-key": []}]
    return found


def json_of(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
