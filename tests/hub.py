"""A stand-in for the Hub on this machine: the part of its HTTP interface that a push needs, and what arrived.

It answers every file as one to send inline, in base64 with the commit, so large-file storage is not spoken.
"""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """Where it listens, the repositories made, and for each commit its message and the files it added."""

    url: str
    made: list[str] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> dict | None:
        """The answer to a POST; None for a path that is not known."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            self.made.append(f"{wanted['organization']}/{wanted['name']}")
            return {"url": f"{self.url}/{self.made[-1]}", "name": self.made[-1], "id": self.made[-1]}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            paths = [one["path"] for one in json.loads(body)["files"]]
            return {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in paths]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append((summary, {one["path"]: base64.b64decode(one["content"]) for one in files}))
            oid = f"{len(self.commits):040x}"
            return {"commitOid": oid, "commitUrl": f"{self.url}/{self.made[-1]}/commit/{oid}", "success": True}
        return None


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A `Hub` on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(hub.answer(self.path.partition("?")[0], body))

        def do_GET(self) -> None:
            self.reply(None)

        def reply(self, answer: dict | None) -> None:
            text = json.dumps(answer if answer is not None else {"error": f"no {self.command} {self.path}"}).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: a test prints what arrived where it fails."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
