"""A Hub for tests: what pushing and loading use of the Hub's HTTP interface, in memory, on 127.0.0.1.

    python tests/loopback_hub.py --port 0        # prints the port; the Hub is away once the process is stopped

- Models, datasets and Spaces; commits, branches and tags; Git LFS with checked sums. No Xet, no pull requests.
- Clients need HF_ENDPOINT, HF_HUB_DISABLE_XET=1 and any HF_TOKEN before huggingface_hub is imported: writing without a
  token is refused, as on the Hub; reading is open.
- An unknown request is 404 or 400 with a reason, never 5xx, which clients would repeat for half a minute.
- Faults are planted: `POST /faults` with `{"kind": ..., "path": regular expression of the path, "method": "GET",
  "skip": matching requests to leave alone first, "times": how many to spoil (null: all), "after": k}`. Kinds: "error"
  (500), "hang" (no answer while the client waits), "cut" (the line breaks after k bytes of the body), "short" (k
  bytes, announced as the whole), "wrong" (byte k differs). `DELETE /faults` mends all; `GET /faults` lists every
  request since, as `[method, path, Range header or ""]`. Let the path name a repository of your own.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import sys
import threading
from typing import NamedTuple
from urllib.parse import parse_qs

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send


USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz", ".gguf", ".gz", ".png", ".gif", ".zip")
LFS_SIZE = 10 * 2**20
LFS_STORE: dict[str, bytes] = {}
FAULTS: list[dict] = []
REQUESTS: list[tuple[str, str, str]] = []


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def blob(self) -> str:
        """Git's name of what lies in the tree: of the pointer, where the file is in LFS."""
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


class Repo:
    def __init__(self, kind: str, repo_id: str, private: bool, sdk: str | None) -> None:
        self.kind, self.id, self.private, self.sdk = kind, repo_id, private, sdk
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, File]) -> str:
        names = [self.branches.get(branch), len(self.commits), *((path, file.blob) for path, file in files.items())]
        sha = hashlib.sha1(repr(names).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


REPOS: dict[tuple[str, str], Repo] = {}


def fail(status: int, message: str, code: str = "", **headers: str) -> HTTPException:
    headers |= {"X-Error-Code": code} if code else {}
    return HTTPException(status, message, {"X-Error-Message": message, **headers})


async def refuse(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def need_token(request: Request) -> None:
    if not request.headers.get("authorization", "").startswith("Bearer "):
        raise fail(401, "Writing needs a token.")


def find(request: Request, write: bool = False) -> Repo:
    if write:
        need_token(request)
    parts = request.path_params
    kind, repo_id = parts.get("kind", "models"), f"{parts['user']}/{parts['name']}"
    if (kind, repo_id) not in REPOS:
        raise fail(404, "Repository not found", "RepoNotFound")
    return REPOS[kind, repo_id]


async def whoami(request: Request) -> Response:
    need_token(request)
    return JSONResponse({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})


async def create(request: Request) -> Response:
    need_token(request)
    body = await request.json()
    kind, repo_id = body.get("type", "model") + "s", f"{body.get('organization') or USER}/{body['name']}"
    answer = {"url": f"{request.base_url}{'' if kind == 'models' else kind + '/'}{repo_id}", "id": repo_id}
    if (kind, repo_id) in REPOS:
        return JSONResponse({**answer, "error": "You already created this repo"}, 409)
    if kind == "spaces" and not body.get("sdk"):
        raise fail(400, "A Space needs an sdk.")
    REPOS[kind, repo_id] = Repo(kind, repo_id, body.get("visibility") == "private", body.get("sdk"))
    return JSONResponse({**answer, "name": repo_id})


async def delete(request: Request) -> Response:
    need_token(request)
    body = await request.json()
    if (
        REPOS.pop((body.get("type", "model") + "s", f"{body.get('organization') or USER}/{body['name']}"), None)
        is None
    ):
        raise fail(404, "Repository not found", "RepoNotFound")
    return JSONResponse({})


def front_matter(text: str) -> dict:
    match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else {}


async def validate_yaml(request: Request) -> Response:
    try:
        front_matter((await request.json())["content"])
    except yaml.YAMLError as error:
        return JSONResponse({"errors": [{"message": f"front matter: {error}"}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})


async def info(request: Request) -> Response:
    repo = find(request)
    sha = repo.sha(request.path_params.get("rev", "main"))
    files = repo.commits[sha]
    card = front_matter(files["README.md"].content.decode()) if "README.md" in files else {}
    answer = {"id": repo.id, "sha": sha, "private": repo.private, "gated": False, "tags": card.get("tags", [])}
    answer |= {"siblings": [{"rfilename": path} for path in sorted(files)], "cardData": card, "sdk": repo.sdk}
    return JSONResponse(answer)


async def preupload(request: Request) -> Response:
    repo = find(request, write=True)
    old, files = repo.commits[repo.sha(request.path_params["rev"])], []
    for asked in (await request.json())["files"]:
        path = asked["path"]
        lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > LFS_SIZE
        known = (old[path].sha256 if lfs else old[path].blob) if path in old and old[path].lfs == lfs else None
        files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": known})
    return JSONResponse({"files": files})


async def lfs_batch(request: Request) -> Response:
    find(request, write=True)
    base, objects = str(request.base_url), []
    for wanted in (await request.json())["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in LFS_STORE:
            put, verify = f"{base}lfs/{wanted['oid']}", f"{base}lfs/verify"
            answer["actions"] = {"upload": {"href": put, "header": {}}, "verify": {"href": verify, "header": {}}}
        objects.append(answer)
    return JSONResponse({"transfer": "basic", "objects": objects})


async def lfs_put(request: Request) -> Response:
    content = await request.body()
    if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
        raise fail(400, "The content does not have this sha256.")
    LFS_STORE[request.path_params["oid"]] = content
    return Response()


async def lfs_verify(request: Request) -> Response:
    body = await request.json()
    if len(LFS_STORE.get(body["oid"], b"")) != body["size"]:
        raise fail(404, "The object is not here, or has another size.")
    return Response()


async def commit(request: Request) -> Response:
    repo, branch = find(request, write=True), request.path_params["rev"]
    if branch not in repo.branches or request.query_params.get("create_pr"):
        raise fail(400, "Commits go to a branch; pull requests are not simulated.")
    files = dict(repo.commits[repo.branches[branch]])
    for line in (await request.body()).splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            if value.get("parentCommit") not in (None, repo.branches[branch]):
                raise fail(412, "A commit has happened since.")
        elif key == "file":
            content = value["content"]
            files[value["path"]] = File(
                base64.b64decode(content) if value.get("encoding") == "base64" else content.encode(), lfs=False
            )
        elif key == "lfsFile":
            if value["oid"] not in LFS_STORE:
                raise fail(400, f"{value['path']} was not uploaded.")
            files[value["path"]] = File(LFS_STORE[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            doomed = value["path"].rstrip("/")
            kept = {p: f for p, f in files.items() if p != doomed and not p.startswith(doomed + "/")}
            if len(kept) == len(files):
                raise fail(404, f"{doomed} is not in the repository.", "EntryNotFound")
            files = kept
        else:
            raise fail(400, f"{key} is not simulated.")
    sha = repo.commit(branch, files)
    return JSONResponse({"success": True, "commitOid": sha, "commitUrl": f"{request.base_url}{repo.id}/commit/{sha}"})


def entries(files: dict[str, File]) -> list[dict]:
    """Files and the folders that hold them, each once."""
    folders = {path[: m.start()] for path in files for m in re.finditer("/", path)}
    listed = [{"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in sorted(folders)]
    return listed + [file.entry(path) for path, file in sorted(files.items())]


async def tree(request: Request) -> Response:
    repo, folder = find(request), request.path_params.get("path", "").strip("/")
    inside = f"{folder}/" if folder else ""
    listed = [e for e in entries(repo.commits[repo.sha(request.path_params["rev"])]) if e["path"].startswith(inside)]
    if folder and not listed:
        raise fail(404, f"{folder} does not exist", "EntryNotFound")
    if request.query_params.get("recursive", "").lower() != "true":
        listed = [e for e in listed if "/" not in e["path"].removeprefix(inside)]
    return JSONResponse(listed)


async def paths_info(request: Request) -> Response:
    repo, body = find(request), await request.body()
    is_json = "json" in request.headers.get("content-type", "")
    paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
    listed = entries(repo.commits[repo.sha(request.path_params["rev"])])
    return JSONResponse([e for e in listed if e["path"] in paths])


async def refs(request: Request) -> Response:
    repo = find(request)
    named = {
        kind: [{"name": n, "ref": f"refs/{git}/{n}", "targetCommit": sha} for n, sha in names.items()]
        for kind, git, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
    }
    return JSONResponse({**named, "converts": []})


async def point(request: Request) -> Response:
    """Make or delete a branch or a tag: the address names the branch, but the revision that a new tag points to."""
    repo, given = find(request, write=True), request.path_params["ref"]
    is_tag = "/tag/" in request.url.path
    names = repo.tags if is_tag else repo.branches
    if request.method == "DELETE":
        if names.pop(given, None) is None:
            raise fail(404, f"{given} does not exist", "RevisionNotFound")
        return JSONResponse({})
    body = json.loads(await request.body() or "{}")
    new = body["tag"] if is_tag else given
    if new in names:
        raise fail(409, f"{new} exists")
    names[new] = repo.sha(given if is_tag else body.get("startingPoint", "main"))
    return JSONResponse({})


async def resolve(request: Request) -> Response:
    repo, path = find(request), request.path_params["path"]
    sha = repo.sha(request.path_params["rev"])
    if path not in repo.commits[sha]:
        raise fail(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
    file = repo.commits[sha][path]
    content, etag = file.content, f'"{file.sha256 if file.lfs else file.blob}"'
    headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
    if file.lfs:
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": etag}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start > end:
            raise fail(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Response(content[start : end + 1], 206, headers, "application/octet-stream")
    return Response(content, 200, headers, "application/octet-stream")


async def faults(request: Request) -> Response:
    if request.method == "POST":
        FAULTS.append({"method": "GET", "skip": 0, "times": 1, "after": 0, **await request.json()})
    elif request.method == "DELETE":
        FAULTS.clear()
        REQUESTS.clear()
    return JSONResponse(REQUESTS)


class Faulty:
    """The app behind a bad line: spoils the requests that a planted fault matches."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/faults":
            return await self.app(scope, receive, send)
        REQUESTS.append((scope["method"], scope["path"], dict(scope["headers"]).get(b"range", b"").decode()))
        fault = self.next_fault(scope)
        if fault is None:
            return await self.app(scope, receive, send)
        kind, after = fault["kind"], fault["after"]
        if kind == "error":
            return await JSONResponse({"error": "Internal Server Error"}, 500)(scope, receive, send)
        if kind == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
            return None

        async def spoil(message: Message) -> None:
            if message["type"] == "http.response.start" and kind == "short":
                kept = [(name, value) for name, value in message["headers"] if name != b"content-length"]
                message["headers"] = [*kept, (b"content-length", str(after).encode())]
            elif message["type"] == "http.response.body" and kind == "wrong":
                body = message["body"]
                message["body"] = body[:after] + bytes([body[after] ^ 1]) + body[after + 1 :]
            elif message["type"] == "http.response.body":
                message["body"] = message["body"][:after]
                if kind == "cut":
                    await send({**message, "more_body": True})
                    raise ConnectionAbortedError("planted")  # uvicorn closes the line of an app that fails here
            await send(message)

        return await self.app(scope, receive, spoil)

    def next_fault(self, scope: Scope) -> dict | None:
        for fault in FAULTS:
            if fault["method"] == scope["method"] and re.search(fault["path"], scope["path"]):
                fault["skip"] -= 1
                if fault["skip"] < 0 and (fault["times"] is None or fault["skip"] + fault["times"] >= 0):
                    return fault
        return None


def app() -> ASGIApp:
    repo, file = "/api/{kind}/{user}/{name}", "/{user}/{name}/resolve/{rev}/{path:path}"
    batch = "/{user}/{name}.git/info/lfs/objects/batch"
    routes = [
        ("GET", "/api/whoami-v2", whoami),
        ("POST", "/api/repos/create", create),
        ("DELETE", "/api/repos/delete", delete),
        ("POST", "/api/validate-yaml", validate_yaml),
        ("GET", repo, info),
        ("GET", repo + "/revision/{rev}", info),
        ("POST", repo + "/preupload/{rev}", preupload),
        ("POST", batch, lfs_batch),
        ("POST", "/{kind}" + batch, lfs_batch),
        ("PUT", "/lfs/{oid}", lfs_put),
        ("POST", "/lfs/verify", lfs_verify),
        ("POST", repo + "/commit/{rev}", commit),
        ("GET", repo + "/tree/{rev}", tree),
        ("GET", repo + "/tree/{rev}/{path:path}", tree),
        ("POST", repo + "/paths-info/{rev}", paths_info),
        ("GET", repo + "/refs", refs),
        *((method, f"{repo}/{what}/{{ref}}", point) for method in ("POST", "DELETE") for what in ("branch", "tag")),
        ("GET", file, resolve),  # Starlette answers HEAD where it answers GET
        ("GET", "/{kind}" + file, resolve),
        *((method, "/faults", faults) for method in ("GET", "POST", "DELETE")),
    ]
    hub = Starlette(
        routes=[Route(path, handler, methods=[method]) for method, path, handler in routes],
        exception_handlers={HTTPException: refuse},
    )
    return Faulty(hub)


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub in memory, for tests.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--until-eof", action="store_true", help="stop when standard input ends (a parent that dies)")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", options.port))  # listening already: the first request only waits
    print(listener.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn.Config(app(), log_level="warning", lifespan="off"))
    if options.until_eof:

        def stop() -> None:
            sys.stdin.read()
            server.should_exit = True

        threading.Thread(target=stop, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
