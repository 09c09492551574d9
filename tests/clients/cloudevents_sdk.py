"""The CloudEvents SDK, on the other side of the pipe.

`parse`: reads requests (`{"headers": …, "body": …}`, one a line) and prints for each what the SDK
finds in it. `emit`: prints requests that the SDK makes, each with what it made it of.
"""

import json
import sys

from cloudevents.conversion import to_binary, to_structured
from cloudevents.http import CloudEvent, from_http


def parse():
    for line in sys.stdin:
        request = json.loads(line)
        headers = {name.lower(): value for name, value in request["headers"]}
        event = from_http(headers, request["body"].encode())
        print(json.dumps({"attributes": dict(event.get_attributes()), "data": event.get_data()}))


def emit():
    events = [
        ({"id": "1", "source": "/lms", "type": "LessonPublished"}, {"title": "é € 😀"}),
        ({"id": "2", "source": "/lms", "type": "T", "subject": "a/b", "datacontenttype": "application/json",
          "dataschema": "https://x.example/y", "partitionkey": "k"}, [1, 2.5, None]),
        ({"id": "3", "source": "/lms", "type": "T", "time": "2024-05-06T07:08:09.123456+02:00",
          "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, "text"),
        ({"id": "4", "source": "urn:x", "type": "T"}, {}),
    ]
    for attributes, data in events:
        event = CloudEvent(dict(attributes), data)
        for make in (to_structured, to_binary):
            headers, body = make(event)
            print(json.dumps({
                "headers": list(headers.items()),
                "body": body.decode(),
                "attributes": dict(event.get_attributes()),
                "data": data,
            }))


{"parse": parse, "emit": emit}[sys.argv[1]]()
