"""A push sends the merged folder, says beforehand what, and goes on after a stop; the hub is a server of this test."""

from __future__ import annotations

import base64
import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qswitch.cli import run
from qswitch.errors import FileError, ModelError
from qswitch.export.merge import merge_run
from qswitch.export.push import push_run
from qswitch.models.student import load_student, save_adapter
from tests.export.test_merge import FP32, TEXTS, trained_run

FILES = {"config.json": "{}", "README.md": 'from_pretrained("path/to/this/folder")', "gguf/s-q8_0.gguf": "GGUF" * 9}


class Hub(ThreadingHTTPServer):
    """Enough of the hub's documented interface for small files: create, preupload, commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.failures = 0
        """How many commits to refuse, as a hub that is down does."""
        self.denied = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, value, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        siblings = [{"rfilename": name} for name in self.server.files]
        self.answer({"id": "me/student", "sha": "0" * 40, "siblings": siblings, "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.denied:
            self.answer({"error": "denied"}, 403)
        elif self.path == "/api/repos/create":
            values = json.loads(body)
            private = values.get("private", values.get("visibility") == "private")
            self.server.created.setdefault(f"{values['organization']}/{values['name']}", private)
            self.answer({"url": f"{self.server.url}/me/student", "id": "me/student", "name": "me/student"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            known = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            self.answer({"files": known, "commitOid": "0" * 40})
        elif "/commit/" in self.path:
            if self.server.failures:
                self.server.failures -= 1
                self.answer({"error": "down"}, 500)
                return
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/student/commit/0", "commitOid": "1" * 40})
        else:
            self.answer({"error": self.path}, 404)

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def merged_run(tmp_path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "run" / "merged" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "run" / "merged" / ".cache").mkdir()
    (tmp_path / "run" / "merged" / ".cache" / "mine").write_text("stays here")
    return tmp_path / "run"


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, merged_run, capsys):
    assert run(["push", str(merged_run), "me/student", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in FILES) and "mine" not in shown
    assert "would go to me/student, private if it is new" in shown and hub.created == {} and hub.files == {}


@pytest.mark.parametrize("public", [False, True])
def test_a_push_sends_every_file_and_is_private_unless_told(hub, merged_run, public, capsys):
    assert run(["push", str(merged_run), "me/student", *(["--public"] if public else [])]) == 0
    assert hub.created == {"me/student": not public}
    assert set(hub.files) == set(FILES) and hub.files["gguf/s-q8_0.gguf"] == b"GGUF" * 9
    assert hub.files["README.md"] == b'from_pretrained("me/student")', "the card's example loads the repository"
    assert f"{hub.url}/me/student" in capsys.readouterr().out


def test_the_card_at_home_keeps_its_placeholder(hub, merged_run):
    """Else a first push to a mistyped name would be in every card that is published later."""
    push_run(merged_run, "me/typo", private=True)
    push_run(merged_run, "me/student", private=True)
    assert hub.files["README.md"] == b'from_pretrained("me/student")'
    assert (merged_run / "merged" / "README.md").read_text() == FILES["README.md"]


def test_a_run_that_went_on_since_it_was_merged_is_not_pushed(hub, tmp_path):
    run_dir, config = trained_run(tmp_path)
    merge_run(run_dir.path, prompts=TEXTS)
    assert push_run(run_dir.path, "me/student", private=True).url is not None
    hub.files.clear()
    save_adapter(load_student(config, FP32), run_dir.adapter_path)
    with pytest.raises(ModelError, match=r"merged before .* went on"):
        push_run(run_dir.path, "me/student", private=True, dry_run=True)
    assert push_run(run_dir.path / "merged", "me/student", private=True).url is not None, "the folder, by its own name"


def test_a_push_that_was_stopped_goes_on(hub, merged_run, monkeypatch):
    hub.failures = 99
    waited: list[float] = []  # by huggingface_hub, which asks a hub that is down again some times: 23 seconds
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="goes on where it was"):
        patch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
        push_run(merged_run, "me/student", private=True)
    assert waited
    hub.failures = 0
    assert push_run(merged_run, "me/student", private=True).url == f"{hub.url}/me/student"
    assert set(hub.files) == set(FILES)


def test_what_the_hub_refuses_is_explained(hub, merged_run):
    hub.denied = True
    with pytest.raises(ModelError, match="HF_TOKEN to a token that may write"):
        push_run(merged_run, "me/student", private=True)


def test_what_fails_on_this_machine_is_not_the_hubs_fault(hub, merged_run, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    for name in ("pathlib.Path.symlink_to", "huggingface_hub.HfApi.upload_folder"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(name, full)
            push_run(merged_run, "me/student", private=True)
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="hub cannot be reached"):
        patch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: int("no answer"))
        push_run(merged_run, "me/student", private=True)
    (merged_run / "merged" / "README.md").write_bytes("Schüler".encode("latin-1"))
    with pytest.raises(FileError, match=r"README.md is not UTF-8"):
        push_run(merged_run, "me/student", private=True)


@pytest.mark.parametrize(
    ("repository", "words"), [("student", "ORG/NAME"), ("a/b/c", "ORG/NAME"), ("me/student", "qswitch merge")]
)
def test_bad_names_and_runs_that_were_not_merged_are_refused(tmp_path, repository, words):
    with pytest.raises(ModelError, match=words):
        push_run(tmp_path, repository, private=True)
