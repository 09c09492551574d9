"""A publisher and a consumer that are traced by OpenTelemetry's own SDK.

    tracing.py publish OTLP NATS_URL SUBJECT ID
    tracing.py consume OTLP AMQP_URL QUEUE

The publisher prints `trace span` of its span. The consumer declares its queue, prints `ready`, takes
one message, and prints its headers as JSON.
"""

import asyncio
import json
import sys

import aio_pika
import nats
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind


async def publish(tracer, url, subject, id):
    client = await nats.connect(url)
    with tracer.start_as_current_span(f"publish {subject}", kind=SpanKind.PRODUCER) as span:
        headers = {"Nats-Msg-Id": id}
        propagate.inject(headers)
        body = json.dumps({"type": "LessonPublished", "data": {"lesson_id": id}}).encode()
        await client.jetstream().publish(subject, body, headers=headers)
        context = span.get_span_context()
        print(f"{context.trace_id:032x} {context.span_id:016x}", flush=True)
    await client.close()


async def consume(tracer, url, queue_name):
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(queue_name, durable=True)
        print("ready", flush=True)
        async with queue.iterator() as messages:
            async for message in messages:
                context = propagate.extract(message.headers)
                with tracer.start_as_current_span(
                    f"process {queue_name}", context=context, kind=SpanKind.CONSUMER
                ):
                    await message.ack()
                print(json.dumps({k: str(v) for k, v in message.headers.items()}), flush=True)
                return


if __name__ == "__main__":
    mode, endpoint, *rest = sys.argv[1:]
    provider = TracerProvider(resource=Resource.create({"service.name": f"{mode}er"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    tracer = trace.get_tracer("tests", tracer_provider=provider)
    asyncio.run({"publish": publish, "consume": consume}[mode](tracer, *rest))
    provider.shutdown()
