"""`lmkit label` on the command line: report, export, and what it refuses."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lmkit.cli import app
from lmkit.label.store import Answers, answers_path, read_pairs


def run(*arguments):
    result = CliRunner().invoke(app, ["label", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.fixture
def answered(pairs):
    for annotator, other in (("anna", "second"), ("ben", "tie")):
        answers = Answers(answers_path(pairs, annotator))
        for number, pair in enumerate(read_pairs(pairs)):
            answers.add(pair.id, "first" if number % 2 else other, swapped=False, seconds=3)
        answers.close()
    return pairs


def test_report_and_export(answered, tmp_path):
    code, text = run(answered, "--report", "--export", tmp_path / "out.jsonl")
    assert code == 0, text
    assert "anna and ben: 50 labelled by both, 50% alike, Cohen's kappa 0.33 +- 0.18" in text
    assert "50 pairs, 50 answered by somebody, 50 decided" in text
    assert "50 decided pairs written" in text
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[3] == {"n": 3, "prompt": "Prompt 3?", "chosen": "first 3", "rejected": "second 3"} | {
        "num_votes": 2,
        "agreement": 1.0,
    }
    assert (rows[4]["chosen"], rows[4]["num_votes"]) == ("second 4", 1)


def test_what_is_refused(pairs, tmp_path):
    for arguments, message in (
        ([tmp_path / "absent.jsonl"], "absent.jsonl does not exist"),
        ([pairs, "--annotator", "../anna"], "Pass --annotator NAME"),
        ([pairs, "--export", tmp_path / "out.jsonl"], "No pair is decided yet"),
    ):
        code, text = run(*arguments)
        assert code == 2, text
        assert message in text


def test_nothing_heavy_is_imported(pairs):
    script = (
        f"import sys; from lmkit.label import agreement, server; from pathlib import Path\n"
        f"server.Session(Path({str(pairs)!r}), 'anna'); server.page()\n"
        "sys.exit(','.join({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.stderr.strip() == ""
