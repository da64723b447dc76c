"""The Hugging Face hub on this machine: one data set, tau/commonsense_qa, in the hub's own
protocol. HF_ENDPOINT leads the real libraries here."""

import hashlib
import http.server
import io
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

NAME = "tau/commonsense_qa"


class HubStandIn:
    """The data set with these rows by split, at the branch main and the revision v1, which both are
    `commit`. `asked`: the paths of all requests."""

    def __init__(self, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self.commit = "1" * 40
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        for name, rows in splits.items():
            file = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(list(rows)), file)
            self.files[f"data/{name}-00000-of-00001.parquet"] = file.getvalue()

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        commit = self.hub.commit
        api = f"/api/datasets/{NAME}"
        known = (api, f"{api}/revision/main", f"{api}/revision/v1", f"{api}/revision/{commit}")
        if path in known:
            self.reply(200, {"id": NAME, "sha": commit, "siblings": []})
        elif path.startswith(f"{api}/tree/{commit}"):
            self.reply(200, self.tree(path.removeprefix(f"{api}/tree/{commit}").strip("/")))
        elif path.startswith(f"/datasets/{NAME}/resolve/v2/"):
            self.reply(404, None, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/datasets/{NAME}/resolve/"):
            self.file(path.split("/", 6)[6])
        else:
            self.reply(404, None, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def tree(self, folder: str) -> list[dict[str, Any]]:
        if not folder:
            return [{"type": "directory", "path": "data", "oid": "2" * 40, "size": 0}]
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for path, content in self.hub.files.items()
        ]

    def file(self, path: str) -> None:
        commit = {"X-Repo-Commit": self.hub.commit}
        if path not in self.hub.files:
            return self.reply(404, None, {"X-Error-Code": "EntryNotFound"} | commit)
        content = self.hub.files[path]
        tag = hashlib.sha1(content).hexdigest()
        return self.reply(200, content, {"ETag": f'"{tag}"'} | commit)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass
