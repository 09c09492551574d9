"""Holds /openapi.json to the OpenAPI specification, and a daemon's answers to /openapi.json.

    openapi.py URL EXAMPLES

EXAMPLES maps paths of the document to lists of requests, as JSON: {"path": …, "status": …,
"method": …, "body": …}. Every GET of the document must have an example. An answer with a member
that is not described fails, as does one that lacks a member that is required.
"""

import json
import sys
import urllib.error
import urllib.request

from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

# An event stream has no end, and /metrics has a parser of its own.
NOT_JSON = {"/v1/events/stream", "/metrics"}


def fetch(method, url, body):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.headers, answer.read()


def closed(schema):
    """The same schema, that takes no members it does not name."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(part) for name, part in schema.items()}
    # A member named `properties` is one of a schema only where it stands beside a type.
    if schema.get("type") == "object" and "properties" in schema:
        made.setdefault("additionalProperties", False)
    return made


def main(url, examples):
    status, _, text = fetch("GET", url + "/openapi.json", None)
    assert status == 200, status
    document = json.loads(text)
    OpenAPIV31SpecValidator(document).validate()

    components = closed(document["components"])
    # A problem may have further members.
    components["schemas"]["Problem"].pop("additionalProperties")
    asked = 0
    for path, methods in document["paths"].items():
        if "get" in methods and path not in NOT_JSON:
            assert path in examples, f"no example of {path}"
        for example in examples.get(path, []):
            method = example.get("method", "GET")
            status, headers, body = fetch(method, url + example["path"], example.get("body"))
            place = f"{method} {example['path']}"
            assert status == example["status"], f"{place}: {status} {body}"
            answer = methods[method.lower()]["responses"].get(str(status))
            assert answer, f"{place}: the status {status} is not described"
            if "$ref" in answer:
                answer = document["components"]["responses"][answer["$ref"].rsplit("/", 1)[1]]
            kind = headers.get_content_type()
            assert kind in answer["content"], f"{place}: {kind} is not described"
            if not kind.endswith("json"):
                continue
            schema = closed(answer["content"][kind]["schema"])
            validator = Draft202012Validator(
                {**schema, "components": components},
                format_checker=Draft202012Validator.FORMAT_CHECKER,
            )
            errors = [f"{place}: {e.json_path}: {e.message}" for e in validator.iter_errors(json.loads(body))]
            assert not errors, "\n".join(errors)
            asked += 1
    print(f"{asked} answers as described")


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as file:
        main(sys.argv[1].rstrip("/"), json.load(file))
