"""The page in a real browser: 50 pairs by keyboard through headless Chromium, the server killed on the way."""

import http.client
import json
import re
import shutil
import subprocess
import time

import pytest

from lmkit.label.store import answers_path, read_answers, read_pairs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--window-size=1200,800"]
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="no chromedriver (Debian: apt-get install chromium-driver)"
    ),
]


class Browser:
    """Chromium behind chromedriver, spoken to in the WebDriver protocol."""

    def __init__(self, port, profile):
        self.connection, self.base = http.client.HTTPConnection("127.0.0.1", port, timeout=30), "/session"
        options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        self.base += (
            "/" + self.ask("POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})["sessionId"]
        )

    def ask(self, method, path, body=None):
        self.connection.request(method, self.base + path, None if body is None else json.dumps(body))
        response = self.connection.getresponse()
        value = json.loads(response.read())["value"]
        assert response.status == 200, value
        return value

    def open(self, link):
        self.ask("POST", "/url", {"url": link})

    def press(self, key):
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def run(self, script):
        return self.ask("POST", "/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, name):
        return self.run(f"document.getElementById('{name}').innerText")

    def wait_for(self, script, wanted):
        deadline = time.monotonic() + 15
        while (found := self.run(script)) != wanted:
            assert time.monotonic() < deadline, f"{script} is {found!r}, not {wanted!r}"
            time.sleep(0.01)


@pytest.fixture
def browser(tmp_path):
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(filter(None, (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)))
    browser = Browser(int(port[1]), tmp_path / "profile")
    yield browser
    browser.ask("DELETE", "")
    driver.terminate()
    driver.wait()
    driver.stdout.close()


def test_fifty_pairs_by_keyboard_with_a_kill_on_the_way(browser, label, pairs, tmp_path):
    counter, keys = "document.getElementById('count').textContent", ["1", "2", "\ue012", "\ue014", "t", "s"]
    given, shown = [], read_pairs(pairs)
    server = label()
    browser.open(server.link)

    def answer(number):
        browser.wait_for(counter, f"{number} of 50")
        sides = [browser.run(f"document.querySelector('#{side} .text').textContent") for side in ("left", "right")]
        assert sorted(sides) == sorted(shown[number].completions)
        browser.press(keys[number % len(keys)])
        picked = {0: 0, 1: 1, 2: 0, 3: 1}.get(number % len(keys))
        given.append(sides[picked] if picked is not None else keys[number % len(keys)])

    for number in range(20):
        answer(number)
    browser.wait_for(counter, "20 of 50")
    assert browser.run("document.title") == "20/50 lmkit label"  # a script in a completion did not run
    browser.press("u")
    browser.wait_for(counter, "19 of 50")
    del given[-1]
    answer(19)
    browser.wait_for(counter, "20 of 50")

    server.kill()
    browser.press("1")
    browser.wait_for("document.getElementById('trouble').hidden", False)
    assert "Start it again" in browser.text("trouble")
    server = label()
    browser.open(server.link)
    for number in range(20, 50):
        answer(number)
    browser.wait_for("document.getElementById('done').hidden", False)
    browser.wait_for(counter, "50 of 50")

    path = answers_path(pairs, "anna")
    standing = read_answers(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(standing) == 50
    assert len(lines) == 52  # one was taken back and given again
    for pair, wanted in zip(shown, given):
        found = standing[pair.id]["answer"]
        assert {"tie": "t", "skip": "s"}.get(found) or pair.completions[("first", "second").index(found)] == wanted
        assert 0 < standing[pair.id]["seconds"] < 60
    lefts = sum(text == shown[n].completions[0] for n, text in enumerate(given) if n % 6 == 0)
    assert 0 < lefts < 9  # the first completion is on the left for some and on the right for others
