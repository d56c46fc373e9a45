"""The Hugging Face hub's interface for uploads, on this machine."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import yaml

TOKEN = "hf_of_me"


@dataclass
class Hub:
    """What it holds, and how it answers."""

    large: tuple[str, ...] = ()
    """Endings of names that go to the store of large files."""
    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Of each repository."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each repository, by their paths."""
    store: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    asked: list[str] = field(default_factory=list)
    """The requests."""

    def answer(self, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[0] == "store":
            self.store[parts[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.url}/{repo}"}
            if repo in self.private:
                return 409, {"error": "You already created this model repo", **url}
            if asked["organization"] != "me":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            self.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return 200, url
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return 200, {"errors": [] if isinstance(front, dict) else [{"message": "no front matter"}], "warnings": []}
        if parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        repo = "/".join(parts[2:4])
        if repo not in self.private:
            return 404, {"error": "Repository not found"}
        if len(parts) == 4:
            return 200, {
                "id": repo,
                "modelId": repo,
                "private": self.private[repo],
                "siblings": [],
                "tags": [],
                "downloads": 0,
            }
        if not repo.startswith("me/"):
            return 403, {"error": "You don't have the rights to write to this repo"}
        if parts[4] == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(self.large or ("\0",)) else "regular",
                 "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": modes}
        assert parts[4] == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files.setdefault(repo, {})[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.store[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files.setdefault(repo, {})[value["path"]] = content
        return 200, {
            "success": True,
            "commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}",
            "commitOid": "0" * 40,
            "hookOutput": "",
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """While it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        own: ClassVar[Hub] = hub

        def do_POST(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, found = self.own.answer(path, body, self.headers.get("Authorization", ""))
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
