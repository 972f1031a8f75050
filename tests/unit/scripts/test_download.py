"""Downloading: which files of a hub model are fetched, that a folder is whole or absent, and what goes wrong in words.

A small server on loopback speaks as much of the hub's protocol as its client needs.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from scripts.model.download import check_space, download, select
from scripts.model.prepare import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"one" * 100,
    "model-00002-of-00002.safetensors": b"two" * 100,
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
    "tokenizer.json": b"{}",
    "training_args.bin": b"foreign",
    "README.md": b"words",
}
FETCHED = [
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "tokenizer.json",
]  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """One model, `org/whole`; `org/gated` needs a token; `org/torn` announces more bytes than it has."""

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/api/models/org/" in path:
            return self._info(path.split("/")[4], path)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        return self._send(200, FILES[name]) if name in FILES else self._send(404, b"", "EntryNotFound")

    def _info(self, model: str, path: str) -> None:
        if model == "gated" and self.headers.get("Authorization") != "Bearer hf_secret":
            return self._send(403, b"{}", "GatedRepo")
        if model not in ("whole", "torn", "gated"):
            return self._send(404, b"{}", "RepoNotFound")
        if path.endswith("/revision/none"):
            return self._send(404, b"{}", "RevisionNotFound")
        extra = 1 if model == "torn" else 0
        files = [
            {"rfilename": name, "path": name, "type": "file", "size": len(data) + extra, "oid": "0" * 40}
            for name, data in FILES.items()
        ]
        body = files if "/tree/" in path else {"id": f"org/{model}", "sha": COMMIT, "siblings": files}
        return self._send(200, json.dumps(body).encode())

    def _send(self, status: int, body: bytes, error: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": len(body), "Content-Type": "application/json", "X-Repo-Commit": COMMIT}
        headers |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"'} | ({"X-Error-Code": error} if error else {})
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    yield
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from huggingface_hub import _snapshot_download, file_download, hf_api

    for module in (constants, hf_api, file_download, _snapshot_download):
        monkeypatch.setattr(module, "ENDPOINT", url, raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_only_what_is_needed_arrives(hub: None, tmp_path: Path) -> None:
    folder = download("org/whole", models=tmp_path)
    assert folder == tmp_path / "whole" and list(tmp_path.iterdir()) == [folder]
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) == FETCHED
    assert all((folder / name).read_bytes() == FILES[name] for name in FETCHED)


def test_what_is_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        download("org/mine", models=tmp_path)
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "model.safetensors").write_text("x")
    assert download("org/mine", models=tmp_path) == tmp_path / "mine"


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/none", None, ["org/none", "no such model", "HF_TOKEN"]),
        ("org/gated", None, ["gated", "https://huggingface.co/org/gated", "HF_TOKEN"]),
        ("org/whole", "none", ["org/whole", "no revision none"]),
        ("org/torn", None, ["org/torn", "run the command again"]),
        ("/etc", None, ["org/name"]),
    ],
)
def test_errors_say_how_to_mend_them(
    hub: None, tmp_path: Path, model: str, revision: str | None, words: list[str]
) -> None:
    with pytest.raises(ModelError) as raised:
        download(model, revision, models=tmp_path)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words)
    assert not [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]


def test_the_token_comes_from_the_environment(hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download("org/gated", models=tmp_path).name == "gated"


def test_without_a_network_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot be reached"):
        download("org/whole", models=tmp_path)


def test_offline_mode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        download("org/whole", models=tmp_path)


def test_a_model_without_safetensors_names_the_option() -> None:
    with pytest.raises(ModelError, match="--weights bin"):
        select("org/old", ["config.json", "pytorch_model.bin", "training_args.bin"], "safetensors")
    with pytest.raises(ModelError, match="no bin weights"):
        select("org/old", ["config.json", "training_args.bin"], "bin")
    assert select("org/x", list(FILES), "bin") == [
        "config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json",
    ]  # fmt: skip


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    check_space(tmp_path, 1000, tmp_path / ".x.partial")
    with pytest.raises(ModelError, match="GB are free"):
        check_space(tmp_path, 10**18, tmp_path / ".x.partial")
