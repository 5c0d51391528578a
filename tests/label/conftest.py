"""A file of 50 pairs, and `lmkit label` as a process on it."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest

NUM_PAIRS = 50


@dataclass
class Labelling:
    """A running `lmkit label`: its process, origin and token."""

    process: subprocess.Popen
    origin: str
    token: str

    @property
    def link(self) -> str:
        return f"{self.origin}/#{self.token}"

    def ask(self, path, body=None, **headers):
        """Status and content of a request; a header of None is left out."""
        return ask(f"{self.origin}{path}", body, {"X-Lmkit-Token": self.token, **headers})

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def ask(url, body=None, headers=None):
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {k: v for k, v in (headers or {}).items() if v is not None})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            status, content, kind = response.status, response.read(), response.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        status, content, kind = error.code, error.read(), error.headers["Content-Type"]
    return status, json.loads(content) if kind == "application/json" else content.decode()


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Prompt {i}?", "completions": [f"first {i}", f"second {i}"], "n": i} for i in range(NUM_PAIRS)]
    rows[1]["completions"][0] = "<script>document.title = 'broken into'</script><img src=x onerror='document.title=1'>"
    rows[2]["prompt"] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def label(pairs):
    """A function that starts `lmkit label` on the pairs; all are ended with the test."""
    started = []

    def start(annotator="anna"):
        command = [sys.executable, "-c", "from lmkit.cli import app; app()", "label", str(pairs)]
        process = subprocess.Popen([*command, "--annotator", annotator], stdout=subprocess.PIPE, text=True)
        started.append(process)
        link = next(filter(None, (re.search(r"(http://127\.0\.0\.1:\d+)/#(\S+)", line) for line in process.stdout)))
        return Labelling(process, *link.groups())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
