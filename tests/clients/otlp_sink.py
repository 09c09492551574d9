"""An OTLP receiver that is not ours: oteltest's. Each span it takes is a line of JSON.

    otlp_sink.py PORT FILE
"""

import json
import logging
import sys

from oteltest.sink import HttpSink


class Spans:
    def __init__(self, file):
        self.file = file

    def handle_trace(self, request, headers):
        for resource in request.resource_spans:
            of = attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    line = {
                        "service": of["service.name"],
                        "resource": of,
                        "trace": span.trace_id.hex(),
                        "span": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "state": span.trace_state,
                        "name": span.name,
                        "kind": span.kind,
                        "begun": span.start_time_unix_nano,
                        "ended": span.end_time_unix_nano,
                        "attributes": attributes(span.attributes),
                        "links": [[link.trace_id.hex(), link.span_id.hex()] for link in span.links],
                        "status": [span.status.code, span.status.message],
                        "key": {k.lower(): v for k, v in headers.items()}.get("api-key"),
                    }
                    self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def attributes(pairs):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


if __name__ == "__main__":
    port, path = sys.argv[1:]
    with open(path, "a", encoding="utf-8") as file:
        HttpSink(Spans(file), logging.getLogger("sink"), port=int(port)).run_server()
