"""Receives webhooks and verifies each with the Standard Webhooks library.

    receive_webhooks.py PORT SECRET…

A request that every one of the secrets verifies is answered with 204, any other with 401. The
body is then read as JSON, and must be that.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks import Webhook, WebhookVerificationError


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    verifiers = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            for verifier in self.verifiers:
                verifier.verify(body, headers)
            json.loads(body)
            self.answer(204, b"")
        except WebhookVerificationError as error:
            self.answer(401, str(error).encode())

    def answer(self, status, body):
        self.send_response(status)
        if body:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    port, *secrets = sys.argv[1:]
    Receiver.verifiers = [Webhook(secret) for secret in secrets]
    ThreadingHTTPServer(("127.0.0.1", int(port)), Receiver).serve_forever()
