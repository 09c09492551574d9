"""Publish a lesson to NATS JetStream, confirmed, from Python.

    pip install nats-py
    python publish_nats.py

Nats-Msg-Id makes a second copy recognisable, so a publish whose answer got lost is simply tried
again with the same id.
"""

import asyncio
import json
import os
import time
import uuid

import nats


async def main():
    client = await nats.connect(os.environ.get("NATS_URL", "nats://127.0.0.1:4222"))
    event_id = str(uuid.uuid4())
    event = {
        "id": event_id,
        "type": "LessonPublished",
        "data": {
            "lesson_id": str(uuid.uuid4()),
            "title": "Photosynthesis for beginners",
            "author_id": str(uuid.uuid4()),
            "published_at": int(time.time() * 1000),
        },
    }
    # Returns when the stream has it; raises where no stream takes the subject.
    ack = await client.jetstream().publish(
        "edupulse.lessons.published",
        json.dumps(event).encode(),
        headers={"Nats-Msg-Id": event_id},
    )
    print(f"{event_id} is number {ack.seq} in {ack.stream}")
    await client.close()


asyncio.run(main())
