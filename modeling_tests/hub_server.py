"""A Hub on loopback: what `huggingface_hub` writes to and reads from, in memory, with faults on demand.

Repositories have branches of commits, files are stored once by their content, large ones come through the LFS protocol.
Nothing is checked that the real Hub alone could check.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_test_token"
OWNER = "tester"


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    def __init__(self, private=False):
        self.private = private
        first = hashlib.sha1(b"first").hexdigest()
        self.commits = {first: {}}  # sha -> {path: (content, is it LFS)}
        self.branches = {"main": first}
        self.messages = []

    def revision(self, name):
        return self.branches.get(name, name if name in self.commits else None)

    def commit(self, branch, changes, removed, message):
        files = {k: v for k, v in self.commits[self.branches[branch]].items() if k not in removed}
        files |= changes
        told = [self.branches[branch], *sorted(f"{k} {hashlib.sha1(v[0]).hexdigest()}" for k, v in files.items())]
        sha = hashlib.sha1("\n".join(told).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class Hub(ThreadingHTTPServer):
    """Attributes: `repositories` {(type, id): Repository}, `faults` (see `fail`), `requests` (what was asked)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects, self.faults, self.requests = {}, {}, [], []
        self.lock = threading.RLock()

    def fail(self, pattern, status, times=1):
        """The next `times` requests "METHOD /path" that match are answered with `status`; "close" hangs up in the
        middle of the body, "after" does what was asked and hangs up instead of answering."""
        self.faults.append([re.compile(pattern), status, times])

    def fault(self, request):
        with self.lock:
            for entry in self.faults:
                if entry[2] > 0 and entry[0].search(request):
                    entry[2] -= 1
                    return entry[1]  # `None` lets it pass
        return None

    def files(self, repo_id, kind="model", revision="main"):
        repository = self.repositories[kind, repo_id]
        return {path: content for path, (content, _) in repository.commits[repository.revision(revision)].items()}

    def handle_error(self, request, client_address):
        """Clients that hang up are no news."""


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def serve(self):
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        request = f"{self.command} {self.route}"
        self.server.requests.append(request)
        fault = self.server.fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "close":
            self.rfile.read(length // 2)
            return self._hang_up()
        self.body = (
            self._read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        if fault == "after":
            self.mute = True
        elif fault is not None:
            return self._answer({"error": "this was asked for by a test"}, fault)
        with self.server.lock:
            self._dispatch()

    mute = False

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _dispatch(self):
        for methods, pattern, handle, needs_token in ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in methods:
                if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
                return handle(self, **found.groupdict())
        return self._answer({"error": f"no route {self.command} {self.route}"}, 404)

    def _answer(self, content, status=200, headers=None, kind="application/json"):
        if self.mute:
            return self._hang_up()
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, what, headers=None):
        self._answer({"error": f"{what} not found"}, 404, {"X-Error-Code": f"{what}NotFound", **(headers or {})})

    def _repository(self, kind, repo_id):
        return self.server.repositories.get((kind or "model", repo_id))

    def _find(self, kind, repo_id, revision):
        """The repository and the commit; what is missing is answered, and `None` instead of the commit."""
        repository = self._repository(kind, repo_id)
        sha = repository and repository.revision(revision)
        if sha is None:
            self._missing("Repo" if repository is None else "Revision")
        return repository, sha

    # ----------------------------------------------------------------------------------------------------------- write

    def whoami(self):
        self._answer({"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        kind = asked.get("type") or "model"
        address = f"{self.server.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if repo_id.split("/")[0] != OWNER:
            return self._answer({"error": "You don't have the rights to create a repository there"}, 403)
        if (kind, repo_id) in self.server.repositories:
            return self._answer({"error": "You already created this repo", "url": address}, 409)
        self.server.repositories[kind, repo_id] = Repository(
            asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        self._answer({"url": address, "name": repo_id, "id": repo_id})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return self._answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self._answer({"errors": [], "warnings": []})

    def preupload(self, kind, repo_id, revision):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return self._missing("Repo")
        there = repository.commits[repository.revision(revision)]
        modes = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > 1_000_000 or file["path"].endswith((".safetensors", ".parquet", ".png", ".tif"))
            content = there.get(file["path"], (None,))[0]
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
            mode = "lfs" if large else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": modes})

    def lfs_batch(self, **_):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs-objects/{wanted['oid']}"}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer({"error": "other bytes than announced"}, 400)
        self.server.objects[oid] = self.body
        self._answer({})

    def commit(self, kind, repo_id, revision):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return self._missing("Repo")
        if revision not in repository.branches:
            return self._missing("Revision")
        changes, removed, summary = {}, set(), ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"]), False
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._answer({"error": f"{value['path']} was never uploaded"}, 400)
                changes[value["path"]] = self.server.objects[value["oid"]], True
            elif entry["key"] == "deletedFile":
                removed.add(value["path"])
        sha = repository.commit(revision, changes, removed, summary)
        self._answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}"})

    def branch(self, kind, repo_id, revision):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return self._missing("Repo")
        if revision in repository.branches:
            return self._answer({"error": "Reference already exists"}, 409)
        repository.branches[revision] = repository.branches["main"]
        self._answer({})

    # ------------------------------------------------------------------------------------------------------------ read

    def info(self, kind, repo_id, revision="main"):
        repository, sha = self._find(kind, repo_id, revision)
        if sha is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self._answer(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "siblings": siblings,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def _blob(self, path, content, large):
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, kind, repo_id, revision, path=""):
        repository, sha = self._find(kind, repo_id, revision)
        if sha is None:
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix, entries = f"{path}/" if path else "", {}
        for name, stored in sorted(repository.commits[sha].items()):
            if not name.startswith(prefix):
                continue
            inside = name.removeprefix(prefix)
            for end in [i for i, letter in enumerate(inside) if letter == "/"][: None if recursive else 1]:
                folder = prefix + inside[:end]
                entries[folder] = {"type": "directory", "path": folder, "oid": git_sha1(folder.encode()), "size": 0}
            if recursive or "/" not in inside:
                entries[name] = self._blob(name, *stored)
        if path and not entries:
            return self._missing("Entry")
        self._answer(list(entries.values()))

    def paths_info(self, kind, repo_id, revision):
        repository, sha = self._find(kind, repo_id, revision)
        if sha is None:
            return
        asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        files, found = repository.commits[sha], []
        for path in asked:
            if path in files:
                found.append(self._blob(path, *files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "oid": git_sha1(path.encode()), "size": 0})
        self._answer(found)

    def refs(self, kind, repo_id):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return self._missing("Repo")
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in repository.branches.items()]
        self._answer({"branches": branches, "tags": [], "converts": []})

    def resolve(self, repo_id, revision, path, kind=None):
        repository, sha = self._find(kind and kind[:-1], repo_id, revision)
        if sha is None:
            return
        if path not in repository.commits[sha]:
            return self._missing("Entry", {"X-Repo-Commit": sha})
        content, large = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        tag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers["X-Linked-Etag" if large else "ETag"] = f'"{tag}"'
        headers |= {"ETag": f'"{tag}"', "X-Linked-Size": len(content)} if large else {}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(content, headers=headers, kind="application/octet-stream")
        start = int(wanted[1]) if wanted[1] else len(content) - int(wanted[2])
        end = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
        if start >= len(content):
            return self._answer(b"", 416, headers)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._answer(content[start : end + 1], 206, headers, "application/octet-stream")


for method in ("GET", "HEAD", "POST", "PUT"):
    setattr(Handler, f"do_{method}", Handler.serve)

_API = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>main|\w{40}|v\d|feature/x)"  # a name with a slash cannot be told from a path
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami, True),
    (("POST",), r"/api/repos/create", Handler.create, True),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml, False),
    (("POST",), _API + rf"/preupload/{_REVISION}", Handler.preupload, True),
    (("POST",), _API + rf"/commit/{_REVISION}", Handler.commit, True),
    (("POST",), _API + rf"/branch/{_REVISION}", Handler.branch, True),
    (("POST",), r"/(?:datasets/)?[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", Handler.lfs_batch, True),
    (("PUT",), r"/lfs-objects/(?P<oid>\w+)", Handler.lfs_upload, False),
    (("GET",), _API, Handler.info, False),
    (("GET",), _API + rf"/revision/{_REVISION}", Handler.info, False),
    (("GET",), _API + rf"/tree/{_REVISION}(?:/(?P<path>.+))?", Handler.tree, False),
    (("POST",), _API + rf"/paths-info/{_REVISION}", Handler.paths_info, False),
    (("GET",), _API + r"/refs", Handler.refs, False),
    (
        ("GET", "HEAD"),
        rf"/(?:(?P<kind>datasets)/)?(?P<repo_id>[\w.-]+/[\w.-]+)/resolve/{_REVISION}/(?P<path>.+)",
        Handler.resolve,
        False,
    ),
]
