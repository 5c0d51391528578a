"""The page's protocol over HTTP: who is let in, what is saved, and that a kill loses nothing."""

import concurrent.futures
import http.client
import json
import random
import socket
import threading

import pytest

from lmkit.errors import BadInput
from lmkit.label.server import TOKEN, Server, Session
from lmkit.label.store import answers_path, is_swapped, read_answers, read_pairs


@pytest.fixture
def served(pairs):
    """A session, and a function (method, path, headers, body) -> (status, headers, content) that asks its server."""
    session = Session(pairs, "anna")
    server = Server(session)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    port, token = server.server_port, server.link.partition("#")[2]

    def ask(method, path, body=None, host=None, token=token, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        given = {"Host": host or f"127.0.0.1:{port}", **({TOKEN: token} if token else {})}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, given)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return response.status, dict(response.headers), json.loads(content) if is_json else content.decode()

    yield session, ask
    server.shutdown()
    server.server_close()
    session.answers.close()


def test_the_page_and_its_policy(served):
    _, ask = served
    status, headers, html = ask("GET", "/", token=None)
    assert status == 200
    assert "innerHTML" not in html
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in html.replace("lmkit label", "")  # nothing from elsewhere


def test_a_labelling_from_first_to_last(served, pairs):
    session, ask = served
    _, _, state = ask("GET", "/state")
    sides = {"left": 0, "right": 1}
    for number, pair in enumerate(read_pairs(pairs)):
        assert state["num_answered"] == number
        shown = state["pair"]
        assert shown["id"] == pair.id
        assert shown["completions"] == list(pair.completions[:: -1 if is_swapped("anna", pair.id) else 1])
        side = ("left", "right", "tie", "skip")[number % 4]
        status, _, state = ask("POST", "/answer", {"pair": pair.id, "side": side, "seconds": 1.5})
        assert status == 200
        row = session.answers.standing[pair.id]
        wanted = (
            ("first", "second")[pair.completions.index(shown["completions"][sides[side]])] if side in sides else side
        )
        assert (row["answer"], row["swapped"]) == (wanted, is_swapped("anna", pair.id))
    assert (state["pair"], state["num_answered"], state["undo"]) == (None, 50, pair.id)
    _, _, state = ask("POST", "/undo", {"pair": pair.id})
    assert (state["pair"]["id"], state["num_answered"]) == (pair.id, 49)


def test_a_request_sent_twice_counts_once_and_another_answer_is_refused(served):
    session, ask = served
    first, second = list(session.pairs)[:2]
    for _ in range(2):
        status, _, state = ask("POST", "/answer", {"pair": first, "side": "left", "seconds": 1})
        assert (status, state["num_answered"], state["pair"]["id"]) == (200, 1, second)
    status, _, state = ask("POST", "/answer", {"pair": first, "side": "right", "seconds": 1})
    assert status == 409
    assert "another answer already" in state["error"]
    assert state["pair"]["id"] == second
    assert len(session.answers.path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:80"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "0.0.0.0:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:1"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"token": None}, 401),
        ({"token": "guessed"}, 401),
        ({"host": "localhost:9"}, 200),  # forwarded by ssh from another port
        ({"host": "localhost:9", "Origin": "http://localhost:9", "Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_who_is_let_in(served, changes, status):
    session, ask = served
    body = {"pair": next(iter(session.pairs)), "side": "left", "seconds": 1}
    assert ask("POST", "/answer", body, **changes)[0] == status
    assert session.num_answered == (status == 200)
    assert ask("GET", "/state", **changes)[0] == status


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/answer", b"{", 400),
        ("/answer", b"", 400),
        ("/answer", b"[]", 400),
        ("/answer", b"x" * 5000, 400),
        ("/answer", {"pair": "unknown", "side": "left"}, 400),
        ("/answer", {"pair": 3, "side": "left"}, 400),
        ("/answer", {"side": "first"}, 400),
        ("/answer", {"side": "undo"}, 400),
        ("/answer", {"side": "left", "seconds": "1"}, 400),
        ("/answer", {"side": "left", "seconds": -1}, 400),
        ("/other", {"side": "left"}, 400),
    ],
)
def test_malformed_requests_change_nothing(served, path, body, status):
    session, ask = served
    if isinstance(body, dict):
        body = {"pair": next(iter(session.pairs)), **body}
    assert ask("POST", path, body)[0] == status
    assert session.answers.path.read_bytes() == b""
    assert ask("GET", "/../pairs.jsonl")[0] == 404
    assert ask("PUT", "/answer")[0] == 501


def test_many_at_once_are_saved_once_each(served):
    session, ask = served
    requests = [{"pair": pair, "side": side, "seconds": 1} for pair in session.pairs for side in ("left", "right")]
    random.Random(0).shuffle(requests)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda body: ask("POST", "/answer", body)[0], requests))
    assert sorted(statuses) == [200] * 50 + [409] * 50
    assert len(session.answers.path.read_text().splitlines()) == 50


def test_a_full_disk_is_told(served, monkeypatch):
    session, ask = served

    def full(row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.answers, "_append", full)
    status, _, reply = ask("POST", "/answer", {"pair": next(iter(session.pairs)), "side": "left", "seconds": 1})
    assert status == 507
    assert "could not be saved" in reply["error"]
    assert session.num_answered == 0


def test_a_taken_port(served):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BadInput, match="Pass another --port"):
        Server(served[0], taken.getsockname()[1])


def test_a_killed_server_loses_nothing(label, pairs):
    """Answers are sent without a pause while the server is killed: those it confirmed are there when it comes back."""
    confirmed, kills, server, draw = {}, [11, 29], label(), random.Random(0)
    while True:
        if kills and len(confirmed) == kills[0]:
            del kills[0]
            threading.Timer(draw.uniform(0, 0.02), server.kill).start()
        try:
            _, state = server.ask("/state")
            if state["pair"] is None:
                break
            pair, side = state["pair"]["id"], draw.choice(("left", "right", "tie", "skip"))
            status, _ = server.ask("/answer", {"pair": pair, "side": side, "seconds": 0.1})
            assert status == 200
            confirmed[pair] = is_swapped("anna", pair), side
        except (OSError, http.client.HTTPException):
            server.process.wait()
            server = label()
            assert server.ask("/state", **{TOKEN: "the old one"})[0] == 401
    assert kills == []
    path = answers_path(pairs, "anna")
    standing = read_answers(path)
    assert len(standing) == len(path.read_text().splitlines()) == 50
    meant = {"left": ("first", "second"), "right": ("second", "first"), "tie": ["tie"] * 2, "skip": ["skip"] * 2}
    assert {pair: standing[pair]["answer"] for pair in confirmed} == {
        pair: meant[side][swapped] for pair, (swapped, side) in confirmed.items()
    }
