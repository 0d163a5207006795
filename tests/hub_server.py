"""A stand-in for the Hugging Face Hub: what `huggingface_hub` asks of it, in memory, on two local ports.

Weights and pictures go through LFS to a storage server of another origin, which must never see a token, whole or in parts. It
refuses what the Hub refuses: unknown tokens, objects that are not what their name says, commits of objects that never came, and
commits on top of another one than was thought. Xet is not spoken, so that clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


OWNER, TOKEN = "me", "hf_" + "writesomethinghere" * 2
READ_ONLY = "hf_" + "readssomethingthere" * 2


@dataclass
class Repo:
    """One repository: its commits, and the branches that point to them."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # paths that are kept as LFS

    def __post_init__(self):
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial commit")

    @property
    def files(self) -> dict[str, bytes]:
        """What stands on the main branch."""
        return self.at("main")

    def at(self, revision: str) -> dict[str, bytes]:
        return dict(self.commits)[self.branches.get(revision, revision)]

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        before = self.branches.get(branch, "")
        names = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([before, str(len(self.commits)), message, *names]).encode()).hexdigest()
        self.commits.append((sha, files))
        self.branches[branch] = sha
        return sha


@dataclass
class Failure:
    """What to answer to the next `times` requests whose method and path match: a status, or a connection that is cut.

    `when` it is cut: `"before"` anything is done, in the `"midst"` of the body, or `"after"` all was done.
    """

    pattern: str
    status: int | None
    times: int
    when: str = "before"


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str | None = None, message: str = "", body: dict | None = None):
        self.status, self.code, self.message, self.body = status, code, message, body or {"error": message}


class Hub:
    """State of the stand-in, and what to do for each request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # larger objects are uploaded in parts
        self.requests: list[tuple[str, str, str]] = []  # method and path, token, body as text
        self.bodies: list[bytes] = []
        self.failures: list[Failure] = []
        self.url = self.storage_url = ""
        self.lock = threading.RLock()

    def fail(self, pattern: str, status: int | None = 503, times: int = 1000, when: str = "before") -> None:
        """Let requests such as `POST /api/models/me/it/commit/main` fail; a status of None cuts the connection."""
        self.failures.append(Failure(pattern, status, times, when))

    def heal(self) -> None:
        self.failures.clear()

    def add(self, name: str, folder: Path) -> None:
        """A repository with the files of a directory."""
        repo = self.repos.setdefault(name, Repo())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        repo.large |= {path for path, data in files.items() if is_large(path, data)}
        repo.commit(repo.files | files, "main", "files of a test")

    def seen(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [line for line, _, _ in self.requests if re.search(pattern, line)]

    def uploaded(self) -> bytes:
        """Every byte that clients sent in bodies of requests, with what was encoded in them decoded."""
        decoded = [data for repo in self.repos.values() for _, files in repo.commits for data in files.values()]
        return b"\n".join([*self.bodies, *decoded, *self.blobs.values()])

    def answer(self, method: str, path: str, query: dict, token: str | None, body: bytes):
        """Status, headers and body."""
        if token not in (TOKEN, READ_ONLY, None):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        for pattern, name in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                groups = {key: unquote(value or "") for key, value in found.groupdict().items()}
                return getattr(self, name)(query=query, token=token, body=body, **groups)
        raise Refused(404, "EntryNotFound", f"the stand-in has no {method} {path}")

    # -- who may do what --------------------------------------------------------------------------------------------
    def _writer(self, token: str | None, name: str | None = None) -> None:
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        if token == READ_ONLY or (name is not None and name.split("/")[0] != OWNER):
            raise Refused(403, None, "You don't have the rights to do this")

    def _repo(self, name: str, token: str | None) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and token is None):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, name: str, revision: str, token: str | None) -> tuple[Repo, str, dict[str, bytes]]:
        repo = self._repo(name, token)
        try:
            return repo, repo.branches.get(revision, revision), repo.at(revision)
        except KeyError:
            raise Refused(404, "RevisionNotFound", f"no revision {revision}") from None

    # -- API --------------------------------------------------------------------------------------------------------
    def whoami(self, token, **_):
        if token is None:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        role = "write" if token == TOKEN else "read"
        return {"type": "user", "name": OWNER, "auth": {"accessToken": {"displayName": "a token", "role": role}}}

    def create(self, token, body, **_):
        asked = json.loads(body)
        if asked.get("type", "model") != "model" or "/" in asked["name"]:
            raise Refused(400, None, "no such type, or no such name")
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        self._writer(token, name)
        if name in self.repos:
            raise Refused(409, None, "You already created this model repo", {"url": f"{self.url}/{name}"})
        self.repos[name] = Repo(private=asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def auth_check(self, name, token, **_):
        self._repo(name, token)
        self._writer(token, name)
        return {}

    def branch(self, name, branch, token, **_):
        repo = self._repo(name, token)
        self._writer(token, name)
        if branch in repo.branches:
            raise Refused(409, None, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def validate_yaml(self, body, **_):
        content = json.loads(body)["content"]
        parts = content.split("---\n", 2)
        try:
            data = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
            problems = problems_of(data) if isinstance(data, dict) else ["the card has no metadata"]
        except yaml.YAMLError as error:
            problems = [str(error)]
        if problems:
            raise Refused(400, None, "bad card", {"errors": [{"message": text} for text in problems]})
        return {"errors": [], "warnings": []}

    def preupload(self, name, revision, token, body, **_):
        self._writer(token, name)
        repo, _, files = self._at(name, revision, token)
        found = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], files.get(file["path"])
            large = is_large(path, base64.b64decode(file["sample"]), file["size"])
            oid = (
                None
                if there is None
                else (hashlib.sha256(there).hexdigest() if path in repo.large else git_oid(there))
            )
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    def lfs_batch(self, name, token, body, **_):
        self._writer(token, name)
        self._repo(name, token)
        asked = json.loads(body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Refused(422, None, "the stand-in knows uploads named by sha256")
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if not re.fullmatch("[0-9a-f]{64}", one["oid"]) or one["size"] < 1:
                answer["error"] = {"code": 422, "message": "no sha256, or no size"}
            elif self.blobs.get(one["oid"]) is None or one["oid"] not in self.verified:
                upload = self._upload(one["oid"], one["size"])
                verify = f"{self.url}/{name}.git/info/lfs/verify"
                answer["actions"] = {"upload": upload, "verify": {"href": verify, "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _upload(self, oid: str, size: int) -> dict:
        """Where an object goes, in one piece or in parts."""
        if self.part_size is None or size <= self.part_size:
            return {"href": f"{self.storage_url}/upload/{oid}", "header": {}}
        count = -(-size // self.part_size)
        parts = {str(number): f"{self.storage_url}/part/{oid}/{number}" for number in range(1, count + 1)}
        return {"href": f"{self.storage_url}/complete/{oid}", "header": {"chunk_size": str(self.part_size), **parts}}

    def lfs_verify(self, name, token, body, **_):
        self._writer(token, name)
        asked = json.loads(body)
        if asked["oid"] not in self.blobs:
            raise Refused(404, None, "Object not found")
        if len(self.blobs[asked["oid"]]) != asked["size"]:
            raise Refused(422, None, "the object has another size")
        self.verified.add(asked["oid"])
        return {}

    def commit(self, name, revision, token, body, **_):
        self._writer(token, name)
        repo, _, files = self._at(name, revision, token)
        header, *changes = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"] or not changes:
            raise Refused(400, None, "a commit has a header, and something in it")
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.branches.get(revision):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files, large = dict(files), set(repo.large)
        for change in changes:
            value = change["value"]
            path = value["path"]
            if path.startswith(("/", ".git/")) or ".." in path.split("/"):
                raise Refused(400, None, f"{path} is no path of a file")
            if change["key"] == "file":
                files[path] = self._regular(path, value)
                large.discard(path)
            elif change["key"] == "lfsFile":
                files[path] = self._large(value)
                large.add(path)
            elif change["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        repo.large = large
        sha = repo.commit(files, revision, header["value"]["summary"])
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}", "hookOutput": ""}

    def _regular(self, path: str, value: dict) -> bytes:
        data = base64.b64decode(value["content"], validate=True)
        if value["encoding"] != "base64" or is_large(path, data):
            raise Refused(400, None, f"{path} has to go through LFS")
        if path == "README.md":
            self.validate_yaml(json.dumps({"content": data.decode()}).encode())
        return data

    def _large(self, value: dict) -> bytes:
        if value["algo"] != "sha256" or value["oid"] not in self.blobs or value["oid"] not in self.verified:
            raise Refused(400, None, "an LFS pointer to a file that was never uploaded")
        if len(self.blobs[value["oid"]]) != value["size"]:
            raise Refused(400, None, "an LFS pointer with another size than its file")
        return self.blobs[value["oid"]]

    def info(self, name, token, revision="main", **_):
        repo, sha, files = self._at(name, revision or "main", token)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, name, revision, token, query, folder="", **_):
        repo, _, files = self._at(name, revision, token)
        inside = f"{folder}/" if folder else ""
        found, folders = [], set()
        for path, data in sorted(files.items()):
            if not path.startswith(inside):
                continue
            head, slash, _ = path[len(inside) :].partition("/")
            if slash and query.get("recursive", [""])[0].lower() != "true":
                folders.add(inside + head)
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if path in repo.large:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            found.append(entry)
        if folder and not found and not folders:
            raise Refused(404, "EntryNotFound", f"no {folder}")
        return [*found, *({"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders))]

    def resolve(self, name, revision, path, token, **_):
        repo, sha, files = self._at(name, revision, token)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"no {path}", {"X-Repo-Commit": sha})
        data, headers = files[path], {"X-Repo-Commit": sha}
        if path not in repo.large:
            return 200, {**headers, "ETag": f'"{git_oid(data)}"'}, data
        oid = hashlib.sha256(data).hexdigest()
        self.blobs[oid] = data
        self.verified.add(oid)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return 302, {**headers, **linked, "Location": f"{self.storage_url}/download/{oid}"}, b""

    # -- storage ----------------------------------------------------------------------------------------------------
    def store(self, oid, token, body, **_):
        if token is not None:
            raise Refused(400, None, "the storage must not be sent a token")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, None, "the object is cut short")
        self.blobs[oid] = body
        return {}

    def store_part(self, oid, number, token, body, **_):
        if token is not None or len(body) > self.part_size:
            raise Refused(400, None, "the storage must not be sent a token, or more than a part")
        self.parts[oid, int(number)] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def complete(self, oid, token, body, **_):
        asked = json.loads(body)
        numbers = [part["partNumber"] for part in asked["parts"]]
        found = [self.parts.get((oid, number), b"") for number in numbers]
        tags = [f'"{hashlib.md5(part).hexdigest()}"' for part in found]
        if asked["oid"] != oid or tags != [part["etag"] for part in asked["parts"]]:
            raise Refused(400, None, "other parts than came")
        return self.store(oid, token, b"".join(found))

    def fetch(self, oid, token, **_):
        if token is not None:
            raise Refused(400, None, "the storage must not be sent a token")
        return 200, {"ETag": f'"{oid}"'}, self.blobs[oid]


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET /api/models/{_NAME}/auth-check(/write)?", "auth_check"),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>[^/]+)", "branch"),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", "preupload"),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", "commit"),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}(/(?P<folder>.+))?", "tree"),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", "info"),
    (rf"GET /api/models/{_NAME}", "info"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (rf"POST /{_NAME}\.git/info/lfs/verify", "lfs_verify"),
    (rf"(GET|HEAD) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    (r"PUT /upload/(?P<oid>\w+)", "store"),
    (r"PUT /part/(?P<oid>\w+)/(?P<number>\d+)", "store_part"),
    (r"POST /complete/(?P<oid>\w+)", "complete"),
    (r"(GET|HEAD) /download/(?P<oid>\w+)", "fetch"),
]


def problems_of(data: dict) -> list[str]:
    """What the Hub would say of the metadata of a card, for the fields that are used here."""
    given = {key: data.get(key) or [] for key in ("tags", "datasets")}
    lists = [key for key, v in given.items() if not (isinstance(v, list) and all(isinstance(one, str) for one in v))]
    if lists:
        return [f"{key} has the wrong type" for key in lists]
    words = [key for key in ("library_name", "pipeline_tag") if not isinstance(data.get(key, ""), str)]
    named = [*(data.get("datasets") or []), *([data["base_model"]] if "base_model" in data else [])]
    ids = [name for name in named if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    return [f"{key} has the wrong type" for key in words] + [f"{name} is no id of the Hub" for name in ids]


def is_large(path: str, data: bytes, size: int | None = None) -> bool:
    """Whether a file goes through LFS: by its name, or because it is large or no text."""
    size = len(data) if size is None else size
    named = path.endswith((".safetensors", ".png", ".bin", ".pt", ".model", ".parquet"))
    return size > 0 and (named or size > 10_000_000 or b"\0" in data)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one packet: the second of two would wait for the client to say that it has the first.
    wbufsize, disable_nagle_algorithm = -1, True
    hub: Hub

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path = quote(unquote(parts.path), safe="/%@")
        line = f"{self.command} {path}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append((line, token or "", self.headers.get("User-Agent", "")))
            failure = next((f for f in self.hub.failures if f.times and re.search(f.pattern, line)), None)
            if failure is not None:
                failure.times -= 1
                if failure.when == "midst":
                    self.rfile.read(int(self.headers["Content-Length"]) // 2)
        cut = failure is not None and failure.status is None
        if cut and failure.when != "after":
            self._hang_up()
            return
        body = self._body()
        with self.hub.lock:
            self.hub.bodies.append(body)
            try:
                if failure is not None and not cut:
                    raise Refused(failure.status, None, "planned by a test")
                found = self.hub.answer(self.command, parts.path, parse_qs(parts.query), token, body)
                status, headers, data = found if isinstance(found, tuple) else (200, {}, json.dumps(found).encode())
            except Refused as refused:
                status, data = refused.status, json.dumps(refused.body).encode()
                headers = {"X-Error-Message": refused.message}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                if "X-Repo-Commit" in refused.body:
                    headers["X-Repo-Commit"] = refused.body["X-Repo-Commit"]
        if cut:
            self._hang_up()
        else:
            self._send(status, headers, data)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *args) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
