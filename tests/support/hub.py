"""A small Hugging Face Hub on this machine, which the real client talks to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


@dataclass(frozen=True)
class Repository:
    """Folders by revision; a gated one gives nothing without a token."""

    revisions: Mapping[str, Path]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """A revision's commit, if there is such a revision; commits name themselves."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, commit: str) -> Path:
        return next(path for name, path in self.revisions.items() if self.commit(name) == commit)


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Iterator[str]:
    """The address of a Hub that holds these repositories, `owner/name` each."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            file: str | None = None
            if path.startswith("/api/models/"):
                owner, model, *rest = path.removeprefix("/api/models/").split("/")
                name, revision = f"{owner}/{model}", rest[1] if rest else "main"
                if rest[:1] == ["tree"]:  # of a folder inside the repository: there is none
                    return self.refuse(404, "EntryNotFound")
            else:
                name, _, place = path.removeprefix("/").partition("/resolve/")
                revision, _, file = place.partition("/")
            repository = repositories.get(name)
            if repository is None:
                return self.refuse(401, "RepoNotFound")
            if repository.gated and file is not None and "Authorization" not in self.headers:
                return self.refuse(401, "GatedRepo")
            commit = repository.commit(revision)
            if commit is None:
                return self.refuse(404, "RevisionNotFound")
            folder = repository.folder(commit)
            if file is None:
                files = [{"rfilename": each.name} for each in sorted(folder.iterdir())]
                content = json.dumps({"id": name, "sha": commit, "siblings": files}).encode()
            elif (folder / file).is_file():
                content = (folder / file).read_bytes()
            else:
                return self.refuse(404, "EntryNotFound", commit)
            self.send_response(200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
            return None

        def refuse(self, status: int, code: str, commit: str = "") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
