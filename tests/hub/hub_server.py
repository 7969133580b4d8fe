"""A small server that speaks the parts of the Hub's HTTP API which huggingface_hub uses for models and collections."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_" + "s3cret" * 5


@dataclass
class Repo:
    """Files by branch: `branches["main"]["config.json"]` is its content."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    def revision(self, name):
        for branch, files in self.branches.items():
            if name in (branch, commit_of(files)):
                return files
        raise Refused(404, "RevisionNotFound")


class Refused(Exception):
    """Answered with this status and error code."""


def commit_of(files):
    return hashlib.sha1(repr(sorted((path, hash_of(content)) for path, content in files.items())).encode()).hexdigest()


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".png"))


class HubServer:
    """
    Context: the server runs in a thread of this process, at `url`.

    `repos`, `blobs` (what LFS holds, by hash), `collections` and `requests` can be looked at; `refuse_after` makes it
    refuse one LFS upload after so many.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.requests: list[str] = []
        self.refuse_after: int | None = None

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def repo(self, name, token):
        if name not in self.repos or (self.repos[name].private and token != TOKEN):
            raise Refused(404, "RepoNotFound")
        return self.repos[name]

    # One method per route: (match, body, token) -> (status, headers, content)

    def validate_yaml(self, match, body, token):
        return {"errors": [], "warnings": []}

    def create_repo(self, match, body, token):
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        if name in self.repos:
            return 409, {"Content-Type": "application/json"}, json.dumps({"url": f"{self.url}/{name}"}).encode()
        self.repos[name] = Repo(body.get("visibility") == "private")
        return {"url": f"{self.url}/{name}"}

    def create_branch(self, match, body, token):
        branches = self.repo(match["repo"], token).branches
        if match["rev"] in branches:
            raise Refused(409, "")
        branches[match["rev"]] = dict(branches["main"])
        return {}

    def preupload(self, match, body, token):
        self.repo(match["repo"], token).revision(match["rev"])
        modes = [(file["path"], "lfs" if is_large(file["path"]) else "regular") for file in body["files"]]
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}

    def lfs_batch(self, match, body, token):
        objects = []
        for wanted in body["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        return {"objects": objects, "transfer": "basic"}

    def lfs_upload(self, match, body, token):
        if self.refuse_after is not None:
            self.refuse_after -= 1
            if self.refuse_after < 0:
                self.refuse_after = None
                raise Refused(403, "")
        assert hash_of(body) == match["oid"] and match["oid"] not in self.blobs
        self.blobs[match["oid"]] = body
        return {}

    def commit(self, match, body, token):
        repo = self.repo(match["repo"], token)
        files = repo.revision(match["rev"])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repo.commits.append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "")
        return {"commitUrl": f"{self.url}/{match['repo']}/commit/{commit_of(files)}", "commitOid": commit_of(files)}

    def model_info(self, match, body, token):
        files = self.repo(match["repo"], token).revision(match["rev"] or "main")
        return {"id": match["repo"], "sha": commit_of(files), "siblings": [{"rfilename": path} for path in files]}

    def tree(self, match, body, token):
        files = self.repo(match["repo"], token).revision(match["rev"])
        inside = {
            path: content for path, content in files.items() if path.startswith((match["path"] or "").lstrip("/"))
        }
        if match["path"] and not inside:
            raise Refused(404, "EntryNotFound")
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hash_of(content)[:40]}
            | ({"lfs": {"oid": hash_of(content), "size": len(content), "pointerSize": 1}} if is_large(path) else {})
            for path, content in inside.items()
        ]

    def resolve(self, match, body, token):
        files = self.repo(match["repo"], token).revision(match["rev"])
        if match["path"] not in files:
            raise Refused(404, "EntryNotFound")
        content = files[match["path"]]
        return 200, {"ETag": f'"{hash_of(content)}"', "X-Repo-Commit": commit_of(files)}, content

    def create_collection(self, match, body, token):
        slug = f"{body['namespace']}/{body['title'].lower().replace(' ', '-')}-{'0' * 24}"
        if slug in self.collections:
            return 409, {}, json.dumps({"slug": slug}).encode()
        self.collections[slug] = body | {"items": []}
        return self._collection(slug)

    def get_collection(self, match, body, token):
        return self._collection(match["slug"])

    def add_item(self, match, body, token):
        items = self.collections[match["slug"]]["items"]
        if body["item"] in items:
            raise Refused(409, "")
        items.append(body["item"])
        return self._collection(match["slug"])

    def _collection(self, slug):
        body = self.collections[slug]
        return {
            "slug": slug,
            "title": body["title"],
            "owner": {"name": body["namespace"]},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": body["private"],
            "theme": "blue",
            "upvotes": 0,
        }


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml),
    ("POST", r"/api/repos/create", HubServer.create_repo),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<rev>.+)", HubServer.create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>.+)", HubServer.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", HubServer.lfs_upload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>.+)", HubServer.commit),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<rev>.+))?", HubServer.model_info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)(?P<path>/.+)?", HubServer.tree),
    ("GET", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", HubServer.resolve),
    ("POST", r"/api/collections", HubServer.create_collection),
    ("POST", r"/api/collections/(?P<slug>.+)/items", HubServer.add_item),
    ("GET", r"/api/collections/(?P<slug>.+)", HubServer.get_collection),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "json" in (self.headers.get("Content-Type") or "") and "ndjson" not in self.headers["Content-Type"]:
            body = json.loads(body or b"null")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        status, headers, content = 404, {}, b""
        for wanted, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                try:
                    result = route(self.hub, match, body, token)
                except Refused as refused:
                    status, code = refused.args
                    headers = {"X-Error-Code": code} if code else {}
                else:
                    if not isinstance(result, tuple):
                        result = 200, {"Content-Type": "application/json"}, json.dumps(result).encode()
                    status, headers, content = result
                break
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *args):
        pass
