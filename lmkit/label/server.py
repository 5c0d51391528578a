"""The page on which one person compares pairs: served on this machine alone, every answer on the disk at once.

What the server lets in: requests whose Host is this machine (a site whose name was pointed here is not), whose Origin,
if any, is this page, and which carry the token of the printed link. The token stands behind the link's `#`, so it is
in no log and no other site can send it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from lmkit.errors import BadInput
from lmkit.label.store import Answers, Pair, answers_path, is_swapped, read_pairs

MAX_BODY_BYTES = 4096
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
TOKEN = "X-Lmkit-Token"  # a header of its own: other sites may not set one without asking first, and nobody answers


class Session:
    """One annotator's way through a file of pairs; the methods may be called from several threads."""

    def __init__(self, path: Path, annotator: str):
        self.pairs, self.annotator, self.file = {pair.id: pair for pair in read_pairs(path)}, annotator, path.name
        self.answers, self._one_at_a_time = Answers(answers_path(path, annotator)), threading.Lock()

    @property
    def num_answered(self) -> int:
        return sum(pair in self.answers.standing for pair in self.pairs)

    def state(self) -> dict[str, Any]:
        """What the page shows: progress, the first pair without an answer, and what undo would take back."""
        with self._one_at_a_time:
            left = (pair for key, pair in self.pairs.items() if key not in self.answers.standing)
            return {
                "file": self.file,
                "annotator": self.annotator,
                "num_pairs": len(self.pairs),
                "num_answered": self.num_answered,
                "pair": self._shown(next(left, None)),
                "undo": self.answers.last if self.answers.last in self.pairs else None,
            }

    def _shown(self, pair: Pair | None) -> dict[str, Any] | None:
        if pair is None:
            return None
        order = -1 if is_swapped(self.annotator, pair.id) else 1
        messages = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else pair.prompt
        return {"id": pair.id, "messages": messages, "completions": pair.completions[::order]}

    def answer(self, pair: str, side: str, seconds: float) -> bool:
        """Records left, right, tie or skip for a pair; False when another answer stands. The same twice counts once."""
        swapped = is_swapped(self.annotator, pair)
        sides = {"left": "first", "right": "second"} if not swapped else {"left": "second", "right": "first"}
        with self._one_at_a_time:
            return self.answers.add(pair, sides.get(side, side), swapped, seconds)

    def undo(self, pair: str) -> None:
        with self._one_at_a_time:
            self.answers.undo(pair)


def page() -> tuple[bytes, str]:
    """The page, and the policy that lets it run its own script and style and nothing else."""
    text = files("lmkit.label").joinpath("page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        return f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    own = f"{allowed('script')}; {allowed('style')}; connect-src 'self'; img-src data:"
    return text.encode(), f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Server(ThreadingHTTPServer):
    """A session's page on 127.0.0.1 (a free port for 0), not yet served; BadInput for a taken port."""

    def __init__(self, session: Session, port: int = 0):
        self.session, self.token, (self.html, self.policy) = session, secrets.token_urlsafe(24), page()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise BadInput(
                f"port {port} of 127.0.0.1 cannot be used ({error.strerror}). Pass another --port."
            ) from None

    @property
    def link(self) -> str:
        """What to open: the page, and the token that lets it ask."""
        return f"http://127.0.0.1:{self.server_port}/#{self.token}"


class Handler(BaseHTTPRequestHandler):
    """One request: let in or refused, answered."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/":
            self.reply(200, self.server.html, "text/html; charset=utf-8")
        elif self.path == "/state":
            if self.with_token():
                self.reply(200, self.server.session.state())
        else:
            self.reply(404, {"error": "there is only / here"})

    def do_POST(self) -> None:
        if self.refused() or not self.with_token():
            return
        session, request = self.server.session, self.body()
        if request is None or request.get("pair") not in session.pairs:
            self.reply(400, {"error": "no pair of this file"})
            return
        pair, side, seconds = request["pair"], request.get("side"), request.get("seconds", 0)
        try:
            if self.path == "/undo":
                session.undo(pair)
            elif self.path != "/answer" or side not in ("left", "right", "tie", "skip"):
                self.reply(400, {"error": "wanted /undo, or /answer with left, right, tie or skip"})
                return
            elif not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
                self.reply(400, {"error": "wanted seconds as a number"})
                return
            elif not session.answer(pair, side, seconds):
                self.reply(409, session.state() | {"error": "this pair has another answer already, which is kept"})
                return
        except OSError as error:
            self.reply(507, {"error": f"the answer could not be saved: {error}"})
            return
        self.reply(200, session.state())

    def refused(self) -> bool:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        strange = not LOCAL.fullmatch(host) or (origin is not None and origin != f"http://{host}")
        if strange or self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            self.reply(403, {"error": "only this page, on this machine, may ask"})
            return True
        return False

    def with_token(self) -> bool:
        if hmac.compare_digest(self.headers.get(TOKEN, "").encode(), self.server.token.encode()):
            return True
        self.reply(401, {"error": "the link is an old one; open the link that `lmkit label` printed last"})
        return False

    def body(self) -> dict | None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return None
        try:
            request = json.loads(self.rfile.read(int(length)))
        except ValueError:
            return None
        return request if isinstance(request, dict) and isinstance(request.get("pair"), str) else None

    def reply(self, status: int, content: Any, kind: str = "application/json") -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": self.server.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        if status != 200:  # what is left of the request was not read
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "lmkit"

    def log_message(self, *_: object) -> None:
        pass


def serve(path: Path, annotator: str, port: int) -> None:
    """Serves the page until Ctrl-C."""
    session = Session(path, annotator)
    server = Server(session, port)
    print(
        f"{len(session.pairs)} pairs, {session.num_answered} answered by {annotator}. Open\n\n  {server.link}\n",
        flush=True,
    )
    print(f"Answers go to {session.answers.path}; Ctrl-C ends.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"\n{session.num_answered} of {len(session.pairs)} pairs answered by {annotator}.")
    finally:
        server.server_close()
        session.answers.close()
