"""Publishes the corpus to a RabbitMQ exchange, each event confirmed, in order within its key.

    publish_amqp.py URL EXCHANGE ROUTING_KEY KIND COUNT LEDGER
"""

import asyncio
import logging
import sys

import aio_pika

from corpus import by_key


async def main(url, exchange_name, routing_key, kind, count, ledger):
    logging.disable(logging.CRITICAL)
    state = {}
    lock = asyncio.Lock()

    async def exchange():
        async with lock:
            if "exchange" not in state:
                connection = await asyncio.wait_for(aio_pika.connect(url, timeout=5), 10)
                channel = await asyncio.wait_for(connection.channel(publisher_confirms=True), 10)
                state["connection"] = connection
                state["exchange"] = await asyncio.wait_for(
                    channel.get_exchange(exchange_name, ensure=False), 10
                )
            return state["exchange"]

    async def publish(event):
        message = aio_pika.Message(
            event.payload,
            message_id=event.id,
            content_type=event.content_type,
            headers=event.headers,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        for _ in range(600):
            target = None
            try:
                target = await exchange()
                # The client's own timeout does not cover a connection that dies meanwhile.
                await asyncio.wait_for(
                    target.publish(message, f"{routing_key}.{event.course}", timeout=10), 15
                )
                return
            except Exception as error:  # away for a while: the same again, with the same id
                last = error
                if target is not None and state.get("exchange") is target:
                    state.pop("exchange")
                    try:
                        await asyncio.wait_for(state.pop("connection").close(), 2)
                    except Exception:
                        pass
                await asyncio.sleep(0.1)
        raise last

    async def one_key(events, confirmed):
        for event in events:
            await publish(event)
            confirmed.write(event.ledger_line() + "\n")

    with open(ledger, "w", encoding="utf-8") as confirmed:
        await asyncio.gather(*(one_key(events, confirmed) for events in by_key(kind, count)))
    if "connection" in state:
        await asyncio.wait_for(state["connection"].close(), 10)


if __name__ == "__main__":
    url, exchange, routing_key, kind, count, ledger = sys.argv[1:]
    asyncio.run(main(url, exchange, routing_key, kind, int(count), ledger))
