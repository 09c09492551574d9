"""Publishes the corpus to JetStream, each event confirmed, in order within its key.

    publish_nats.py URL SUBJECT KIND COUNT LEDGER
"""

import asyncio
import sys

import nats

from corpus import by_key


async def main(url, subject, kind, count, ledger):
    client = await nats.connect(
        url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, allow_reconnect=True
    )
    stream = client.jetstream(timeout=5)

    async def publish(event):
        headers = {"Nats-Msg-Id": event.id, "Content-Type": event.content_type, **event.headers}
        for _ in range(600):
            try:
                await stream.publish(f"{subject}.{event.course}", event.payload, headers=headers)
                return
            except Exception as error:  # away for a while: the same again, with the same id
                last = error
                await asyncio.sleep(0.1)
        raise last

    async def one_key(events, confirmed):
        for event in events:
            await publish(event)
            confirmed.write(event.ledger_line() + "\n")

    with open(ledger, "w", encoding="utf-8") as confirmed:
        await asyncio.gather(*(one_key(events, confirmed) for events in by_key(kind, count)))
    await client.close()


if __name__ == "__main__":
    url, subject, kind, count, ledger = sys.argv[1:]
    asyncio.run(main(url, subject, kind, int(count), ledger))
