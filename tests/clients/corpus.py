"""The events of the end-to-end tests, made from their number alone.

Half are native, half CloudEvents (structured and binary in turn); their JSON is valid and odd:
escapes, big numbers, duplicate keys, unusual white space. Keys are in the body, and each event
carries its number within its key, so order can be checked from the log alone.
"""

import json
import uuid

KEYS = 97
SPACE = uuid.UUID("6f0c3c0e-95cf-4f0e-9f7a-6a1c7b0f5d11")

ODD = [
    '"plain"',
    '"\\u00e9\\/\\ud83d\\ude00 \\"quoted\\" \\\\ \\b\\f\\n\\r\\t"',
    "123456789012345678901234567890.000000000000000000001",
    "-0.0",
    "1e400",
    '{"twice": 1, "twice": 2, "": null}',
    '[ \t1\n,\r\n 2 ,[ ] , { } ]',
    '"\\u0000 and \\u001f"',
    '"žluťoučký kůň 你好 🎉"',
    "[" * 60 + "]" * 60,
    '"' + "x" * 4000 + '"',
    "1E+2",
]


class Event:
    """One event: what is published, and what must be found."""

    def __init__(self, kind, number):
        assert kind in ("LessonPublished", "QuizSubmitted")
        self.kind = kind
        self.number = number
        self.course = f"course-{number % KEYS}"
        self.in_key = number // KEYS
        self.id = str(uuid.uuid5(SPACE, f"{kind}/{number}"))
        self.form = ("native", "structured", "native", "binary")[number % 4]
        # Native events carry no source of their own: the configuration says "/".
        self.source = "/" if self.form == "native" else "/edupulse/content"
        self.headers = {}
        self.content_type = "application/json"
        data = self._data()
        if self.form == "native":
            self.body = '{"type": "%s",  "id":"%s","data":%s}' % (kind, self.id, data)
        elif self.form == "structured":
            self.content_type = "application/cloudevents+json"
            self.body = (
                '{"specversion":"1.0","id":"%s","source":"%s",\n\t"type":"%s","data" : %s }'
                % (self.id, self.source, kind, data)
            )
        else:
            self.headers = {
                "ce-specversion": "1.0",
                "ce-id": self.id,
                "ce-source": self.source,
                "ce-type": kind,
            }
            self.body = data
        self.payload = self.body.encode()

    def _data(self):
        common = '"course":"%s", "n" : %d' % (self.course, self.in_key)
        odd = ODD[self.number % len(ODD)]
        if self.kind == "LessonPublished":
            return (
                '{"lesson_id":"%s","title":"Lesson %d of photosynthesis","author_id":"%s",'
                '"published_at":%d, %s, "odd":%s}'
                % (
                    uuid.uuid5(SPACE, f"lesson/{self.number}"),
                    self.number,
                    uuid.uuid5(SPACE, f"author/{self.number % 7}"),
                    1700000000000 + self.number,
                    common,
                    odd,
                )
            )
        return '{"quiz_id":"%s","student_id":"%s","score":%s,"submitted_at":%d, %s, "odd":%s}' % (
            uuid.uuid5(SPACE, f"quiz/{self.number}"),
            uuid.uuid5(SPACE, f"student/{self.number % 31}"),
            (self.number % 101) / 10,
            1700000000000 + self.number,
            common,
            odd,
        )

    def ledger_line(self):
        """What the broker has confirmed, for the audit."""
        return json.dumps(
            {
                "id": self.id,
                "source": self.source,
                "type": self.kind,
                "key": self.course,
                "n": self.in_key,
                "form": self.form,
                "body": self.body,
            },
            ensure_ascii=False,
        )


def by_key(kind, count):
    """The events grouped by key: within a key they are published one after the other."""
    keys = {}
    for number in range(count):
        event = Event(kind, number)
        keys.setdefault(event.course, []).append(event)
    return list(keys.values())
