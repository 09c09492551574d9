"""Publish a quiz result to RabbitMQ, confirmed and routed, from Python.

    pip install pika
    python publish_amqp.py

message_id makes a second copy recognisable, so a publish whose confirm got lost is simply tried
again with the same id.
"""

import json
import os
import time
import uuid

import pika

connection = pika.BlockingConnection(
    pika.URLParameters(os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f"))
)
channel = connection.channel()
channel.confirm_delivery()

event_id = str(uuid.uuid4())
event = {
    "id": event_id,
    "type": "QuizSubmitted",
    "data": {
        "quiz_id": str(uuid.uuid4()),
        "student_id": str(uuid.uuid4()),
        "score": 8.5,
        "submitted_at": int(time.time() * 1000),
    },
}
# Raises UnroutableError where no queue is bound, NackError where the queue refuses it.
channel.basic_publish(
    exchange="edupulse",
    routing_key="quiz.submitted",
    body=json.dumps(event).encode(),
    properties=pika.BasicProperties(
        message_id=event_id,
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent,
    ),
    mandatory=True,
)
print(f"{event_id} is confirmed")
connection.close()
