"""The stand-in for the Hub refuses what the Hub refuses: else a push to it would prove nothing."""

import base64
import hashlib
import json

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import READ_ONLY, TOKEN


DATA = b"weights" * 100
OID = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("me/it")
    return api


def send(hub, method, url, token=TOKEN, **kwargs):
    url = url if url.startswith("http") else f"{hub.url}{url}"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx2.request(method, url, headers=headers, **kwargs)


def commit(hub, *changes, **header):
    items = [{"key": "header", "value": {"summary": "a test", **header}}, *changes]
    return send(hub, "POST", "/api/models/me/it/commit/main", content="\n".join(map(json.dumps, items)).encode())


def pointer(oid=OID, size=700, algo="sha256"):
    return {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": algo, "oid": oid, "size": size}}


def file(path, data):
    content = base64.b64encode(data).decode()
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


def test_objects_are_what_their_names_say(hub, api):
    batch = {"operation": "upload", "hash_algo": "sha256", "transfers": ["basic"]}
    answer = send(
        hub, "POST", "/me/it.git/info/lfs/objects/batch", json={**batch, "objects": [{"oid": OID, "size": len(DATA)}]}
    )
    actions = answer.json()["objects"][0]["actions"]
    assert commit(hub, pointer()).status_code == 400
    assert send(hub, "PUT", actions["upload"]["href"], token=None, content=DATA[:-1]).status_code == 400
    assert send(hub, "PUT", actions["upload"]["href"], content=DATA).status_code == 400  # with a token
    assert send(hub, "POST", actions["verify"]["href"], json={"oid": OID, "size": len(DATA)}).status_code == 404
    assert send(hub, "PUT", actions["upload"]["href"], token=None, content=DATA).status_code == 200
    assert commit(hub, pointer()).status_code == 400  # nobody has verified it
    assert send(hub, "POST", actions["verify"]["href"], json={"oid": OID, "size": 3}).status_code == 422
    assert send(hub, "POST", actions["verify"]["href"], json={"oid": OID, "size": len(DATA)}).status_code == 200
    for wrong in (pointer(size=3), pointer(oid="0" * 64), pointer(algo="sha1")):
        assert commit(hub, wrong).status_code == 400
    assert set(hub.repos["me/it"].files) == {".gitattributes"}
    assert commit(hub, pointer()).status_code == 200
    assert hub.repos["me/it"].files["model.safetensors"] == DATA


@pytest.mark.parametrize(
    "change",
    [
        file("model.safetensors", DATA),
        file("notes.txt", b"no\0text"),
        file("../notes.txt", b"text"),
        file("README.md", b"---\ntags: 3\n---\n"),
        {"key": "deletedFile", "value": {"path": "missing.txt"}},
        {"key": "something", "value": {"path": "a"}},
    ],
    ids=lambda change: f"{change['key']} {change['value']['path']}",
)
def test_commits_that_are_refused_change_nothing(hub, api, change):
    assert commit(hub, file("good.txt", b"good"), change).status_code in (400, 404)
    assert set(hub.repos["me/it"].files) == {".gitattributes"} and len(hub.repos["me/it"].commits) == 1


def test_a_commit_stands_on_its_parent(hub, api):
    first = api.model_info("me/it").sha
    api.create_commit("me/it", [CommitOperationAdd("a.txt", b"a")], commit_message="a", parent_commit=first)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("me/it", [CommitOperationAdd("b.txt", b"b")], commit_message="b", parent_commit=first)
    assert refused.value.response.status_code == 412
    with pytest.raises(HfHubHTTPError):
        api.create_commit("me/it", [CommitOperationDelete("c.txt")], commit_message="c")


def test_who_is_nobody_and_what_is_not_there(hub, api):
    for path in ("/api/models/me/it", "/api/whoami-v2", "/me/it/resolve/main/.gitattributes"):
        assert send(hub, "GET", path, token="hf_wrong").status_code == 401
    assert send(hub, "GET", "/api/whoami-v2", token=None).status_code == 401
    assert send(hub, "GET", "/api/models/me/none").status_code == 404
    assert send(hub, "GET", "/api/models/me/none", token=None).status_code == 401
    assert send(hub, "POST", "/api/repos/create", json={"name": "it"}).status_code == 409
    assert send(hub, "POST", "/api/repos/create", json={"name": "new"}, token=READ_ONLY).status_code == 403
    for path in ("/api/models/me/it/preupload/main", "/me/it.git/info/lfs/objects/batch"):
        assert send(hub, "POST", path, token=READ_ONLY, json={}).status_code == 403
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="me/none")
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files("me/it", revision="none")
    api.create_repo("me/secret", private=True)
    assert send(hub, "GET", "/api/models/me/secret", token=None).status_code == 401


def test_what_was_uploaded_comes_back(hub, api, tmp_path):
    hub.part_size = 256
    operations = [CommitOperationAdd("model.safetensors", DATA), CommitOperationAdd("sub/a.txt", b"a")]
    first = api.create_commit("me/it", operations, commit_message="both").oid
    api.create_commit("me/it", [CommitOperationDelete("sub/a.txt")], commit_message="one less")
    assert hub.seen("PUT /part/") and hub.seen("POST /complete/")
    path = hf_hub_download("me/it", "model.safetensors", cache_dir=tmp_path, endpoint=hub.url)
    with open(path, "rb") as weights:
        assert weights.read() == DATA
    assert OID in str(tmp_path.joinpath(path).resolve())  # X-Linked-Etag names the file in the cache
    folder = snapshot_download("me/it", revision=first, local_dir=tmp_path / "all", endpoint=hub.url)
    assert (tmp_path / "all" / "sub" / "a.txt").read_bytes() == b"a" and folder
    assert {file.path for file in api.list_repo_tree("me/it", revision=first, recursive=True)} >= {"sub/a.txt"}
