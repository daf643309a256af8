"""Servers on loopback for the tests of remote rewards: the real application, and one that misbehaves as told."""

import contextlib
import socket
import socketserver
import struct
import threading
from dataclasses import dataclass, field

HEALTH = b'{"protocol": 1, "version": "0", "rewards": {"brightness": {"golden": 0.5, "error": null}}, "limits": {}}'


@contextlib.contextmanager
def serving(app):
    """The URL of the application, served by uvicorn in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", access_log=False))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=10)
        listening.close()


@dataclass
class Faulty:
    """A server that answers /health properly and everything else by ``behave(faulty, connection, body)``."""

    behave: object
    health: bytes = HEALTH
    requests: list = field(default_factory=list)  # bodies of what was posted
    released: threading.Event = field(default_factory=threading.Event)  # set when the test is over: hangs end

    def __enter__(self):
        faulty = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with contextlib.suppress(OSError):  # the client may leave, or the behaviour cut the line
                    faulty.answer(self.request)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.stop()

    def stop(self):
        """Stop listening; connections are refused from here on."""
        self.server.shutdown()
        self.server.server_close()

    def answer(self, connection):
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
        while len(body) < int((lengths or [b"0"])[0]):
            body += connection.recv(65536)
        if head.startswith(b"GET /health"):
            connection.sendall(response(self.health))
        else:
            self.requests.append(body)
            self.behave(self, connection, body)


def response(body, status="200 OK", length=None, kind="application/json"):
    """An HTTP response; ``length`` may lie."""
    length = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def cut(connection):
    """End the connection as a killed process does: no goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
