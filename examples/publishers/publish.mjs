// Publish a lesson to NATS JetStream and a quiz result to RabbitMQ, both confirmed, from Node.
//
//     npm install nats amqplib
//     node publish.mjs
//
// The id makes a second copy recognisable, so a publish whose answer got lost is simply tried
// again with the same id.

import { randomUUID } from "node:crypto";
import amqp from "amqplib";
import { connect, headers } from "nats";

const lesson = {
  id: randomUUID(),
  type: "LessonPublished",
  data: {
    lesson_id: randomUUID(),
    title: "Photosynthesis for beginners",
    author_id: randomUUID(),
    published_at: Date.now(),
  },
};
const nats = await connect({ servers: process.env.NATS_URL ?? "nats://127.0.0.1:4222" });
const ack = await nats
  .jetstream()
  .publish("edupulse.lessons.published", JSON.stringify(lesson), { msgID: lesson.id, headers: headers() });
console.log(`${lesson.id} is number ${ack.seq} in ${ack.stream}`);
await nats.close();

const quiz = {
  id: randomUUID(),
  type: "QuizSubmitted",
  data: {
    quiz_id: randomUUID(),
    student_id: randomUUID(),
    score: 8.5,
    submitted_at: Date.now(),
  },
};
const rabbit = await amqp.connect(
  process.env.AMQP_URL ?? "amqp://guest:guest@127.0.0.1:5672/%2f",
);
const channel = await rabbit.createConfirmChannel();
let returned = false;
channel.on("return", () => (returned = true));
channel.publish("edupulse", "quiz.submitted", Buffer.from(JSON.stringify(quiz)), {
  messageId: quiz.id,
  contentType: "application/json",
  persistent: true,
  mandatory: true,
});
await channel.waitForConfirms();
if (returned) throw new Error("no queue is bound for quiz.submitted");
console.log(`${quiz.id} is confirmed`);
await rabbit.close();
