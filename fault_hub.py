"""Rows of faults.py about the Hub: a server on loopback that speaks as much of its protocol as a download needs, and fails on demand."""
from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fault_kit import Kit, refused, require, succeeded

COMMIT = "c0" * 20
ANSWERS = {  # fault: (status, headers) of every answer
    "revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}),
    "no token": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}),
    "busy": (503, {}), "too many": (429, {})}


class Hub(ThreadingHTTPServer):
    """One model repository of the given folder's files. fault: None, a key of ANSWERS, "silent" (no answer to anything) or "stalled" (files stop
    after their first bytes); asked: the paths that were asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, fault: str | None = None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.fault, self.asked, self.over = fault, [], threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/agent-harnesses":  # the library asks every server once a day for things of its own
            return self.say(404, b"")
        hub.asked.append(path)
        if hub.fault == "silent":
            hub.over.wait()
        elif hub.fault in ANSWERS:
            status, headers = ANSWERS[hub.fault]
            self.say(status, b"{}", headers)
        elif "/tree/" in path:
            self.say(200, json.dumps([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                                      for name, data in hub.files.items()]).encode())
        elif path.startswith("/api/models/"):
            self.say(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}).encode())
        else:
            self.file(path.rpartition("/")[2])

    do_HEAD = do_GET

    def file(self, name: str) -> None:
        data = self.server.files.get(name)
        if data is None:
            return self.say(404, b"", {"X-Error-Code": "EntryNotFound"})
        hashed = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1  # large files are named by the one, small ones by another
        stalled = self.server.fault == "stalled" and name.endswith(".safetensors")
        self.say(200, data, {"ETag": f'"{hashed(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, 100 if stalled else None)
        if stalled:
            self.server.over.wait()

    def say(self, status: int, body: bytes, headers=(), most: int | None = None) -> None:
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has lost patience
                self.wfile.write(body[:most])
                self.wfile.flush()


@contextlib.contextmanager
def hub_of(folder: Path, fault: str | None = None):
    hub = Hub(folder, fault)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        hub.shutdown()
        hub.server_close()


def asked_of_hub(kit: Kit, name: str, address: str, model: str = "some/model", offline: bool = False, cache: str | None = None):
    """Run the experiment with a model of the Hub, one second of patience and a cache of its own."""
    env = kit.env | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "1" if offline else "0", "HF_HOME": str(kit.root / f"hub-{cache or name}"),
                     "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    argv = ["run_experiment.py", "--model", model, "--benchmark", str(kit.benchmark), "--lang", "en", "--levels", "1", "--limit", "1", "--conditions", "C_nothing",
            "--device", "cpu", "--out", str(kit.root / f"hub-out-{name}")]
    begun = time.monotonic()
    return kit.run(argv, env=env), time.monotonic() - begun


def hub(kit: Kit) -> str:
    """Every answer that a hub may give or not give: one line, in a bounded time, and nothing is written."""
    said = []
    for name, model, *named in (("revision", "some/model@nope", "no revision nope"), ("no token", "some/model", "HF_TOKEN"), ("gated", "some/model", "HF_TOKEN"),
                                ("busy", "some/model", "cannot be reached"), ("too many", "some/model", "cannot be reached"),
                                ("silent", "some/model", "does not answer"))[:kit.cases(6, 2)]:
        with hub_of(kit.model, name) as server:
            ended, seconds = asked_of_hub(kit, name.replace(" ", "-"), server.address, model)
            refused(ended, model, *named)
            tries = 1 if name in ("revision", "no token", "gated") else 3
            require(len(server.asked) == tries, f"{name}: asked {len(server.asked)} times, not {tries}")
            said.append(f"{name} {tries}x in {seconds:.0f} s")
    ended, seconds = asked_of_hub(kit, "unreachable", "http://127.0.0.1:9")  # a port where nothing listens
    refused(ended, "cannot be reached", "ConnectError")
    require(ended.err.count("trying again") == 2, "not tried again")
    require(not list(kit.root.glob("hub-out-*")), "results were begun")
    return f"{', '.join(said)}, unreachable 3x in {seconds:.0f} s: one line each, nothing written"


def hub_stalled(kit: Kit) -> str:
    """A download that stops in the middle is given up, and goes on when the Hub does."""
    with hub_of(kit.model, "stalled") as server:
        ended, seconds = asked_of_hub(kit, "stalled", server.address)
        refused(ended, "does not answer")
        server.fault = None
        server.over.set()
        succeeded(asked_of_hub(kit, "went-on", server.address, cache="stalled")[0])
    return f"given up after {seconds:.0f} s of tries, and complete when the Hub answered again"


def offline(kit: Kit) -> str:
    """With HF_HUB_OFFLINE nothing is asked of anybody; models of a folder or the table need no hub even without it."""
    with hub_of(kit.model) as server:
        ended, _ = asked_of_hub(kit, "offline", server.address, offline=True)
        refused(ended, "HF_HUB_OFFLINE")
        require(not server.asked, f"asked for {server.asked[:3]} although it is offline")
        for name, model in (("folder", str(kit.model)), ("table", "tiny-llama")):
            succeeded(asked_of_hub(kit, f"offline-{name}", server.address, model)[0])
        require(not server.asked, f"asked for {server.asked[:3]} although the model is on this machine")
        succeeded(asked_of_hub(kit, "filled", server.address)[0])
        asked = len(server.asked)
        succeeded(asked_of_hub(kit, "cached", server.address, offline=True, cache="filled")[0])
        require(asked > 0 and len(server.asked) == asked, "asked although it is offline and everything is in the cache")
        blob = next(path for path in (kit.root / "hub-filled").rglob("blobs/*") if len(path.name) == 64)
        blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
        refused(asked_of_hub(kit, "changed", server.address, offline=True, cache="filled")[0], "cut short or changed", blob)
    return "not one request, offline or where the model is here already; a changed file of the cache is named"
