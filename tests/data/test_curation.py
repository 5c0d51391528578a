"""Curated prompts: what counts as a duplicate, clusters that are there to be found, and the files of a run."""

import importlib
import json

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from lmkit.artifact import verify
from lmkit.cli import app
from lmkit.data.curation import cluster, cluster_table, embed, evenly, without_duplicates
from lmkit.errors import BadInput
from lmkit.tokenization.chat import render
from lmkit.tokenization.train import train_tokenizer

pytest.importorskip("datasketch", reason="the curation extra is not installed")
pytest.importorskip("sklearn.cluster", reason="the curation extra is not installed")

LONG = "Write a long letter to your grandmother about the summer that you spent beside the sea with her two goats"
TEXTS = ["Tell me a story.", "tell me  a STORY", LONG, f"{LONG}.", f"{LONG} too", "Tell me of a goat.", "¿?", "!"]


def test_duplicates_are_exact_in_their_words_or_near_in_their_letters():
    kept, counts = without_duplicates(TEXTS)
    assert [TEXTS[row] for row in kept] == [TEXTS[0], LONG, "Tell me of a goat.", "¿?", "!"]
    assert counts == {"exact": 2, "near": 1}


def test_the_threshold_is_the_jaccard_similarity_of_five_characters_in_a_row():
    """ "abcdefghij" has 6 shingles, one letter more makes 7 of which 6 are shared."""
    both = ["abcdefghij", "abcdefghijk"]
    assert without_duplicates(both, threshold=0.99 * 6 / 7)[0] == [0]
    assert without_duplicates(both, threshold=1.01 * 6 / 7)[0] == [0, 1]


def test_groups_are_found_and_drawn_from_evenly():
    generator = np.random.default_rng(0)
    centres = np.eye(3)[[0] * 30 + [1] * 10 + [2] * 5]
    clusters, distances = cluster(centres + 0.01 * generator.normal(size=centres.shape), 3, seed=0)
    assert clusters.tolist() == [0] * 30 + [1] * 10 + [2] * 5  # the largest first
    chosen = evenly(clusters, 20, seed=0)
    assert np.bincount(clusters[chosen]).tolist() == [8, 7, 5] or np.bincount(clusters[chosen]).tolist() == [7, 8, 5]
    assert chosen == sorted(set(chosen)) == evenly(clusters, 20, seed=0) != evenly(clusters, 20, seed=1)
    table = cluster_table(clusters, distances, chosen, [f"text {n}" for n in range(45)])
    assert [row["size"] for row in table] == [30, 10, 5]
    assert sum(row["chosen"] for row in table) == 20
    assert all(row["distance"] < 0.05 and clusters[int(row["typical"][5:])] == row["cluster"] for row in table)
    with pytest.raises(BadInput, match="50 clusters of 45 prompts"):
        cluster(centres, 50, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(lambda: [LONG] * 3, vocab_size=384, allow_smaller_vocab=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=384, num_attention_heads=2, num_key_value_heads=2, **sizes)
    Qwen3ForCausalLM(config).eval().save_pretrained(folder / "sft/model")
    tokenizer.save_pretrained(folder / "sft/model")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t, "id": n}) + "\n" for n, t in enumerate(TEXTS))
    )
    return folder, Qwen3ForCausalLM.from_pretrained(folder / "sft/model"), tokenizer


@torch.no_grad()
def test_a_direction_is_the_mean_over_the_prompts_own_tokens(run):
    _, model, tokenizer = run
    alone = [model.model(torch.tensor([render(tokenizer, text)[0]])).last_hidden_state[0].mean(0) for text in TEXTS]
    expected = torch.stack(alone) - torch.stack(alone).mean(0)
    vectors = embed(model, tokenizer, TEXTS, batch_size=3)
    assert np.allclose(vectors, torch.nn.functional.normalize(expected), atol=1e-5)


def test_the_command_writes_what_the_stages_and_the_report_read(run):
    folder, *_ = run
    words = ["curate", str(folder / "prompts.jsonl"), str(folder), "--num-prompts", "3", "--num-clusters", "2"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert "8 prompts, 2 exact and 1 near duplicates, 3 kept in" in told.output
    verify(folder / "curation")
    rows = [json.loads(line) for line in (folder / "curation/prompts.jsonl").read_text().splitlines()]
    assert all(TEXTS[row["id"]] == row["prompt"] for row in rows)
    found = json.loads((folder / "curation/clusters.json").read_text())
    assert [row["cluster"] for row in found["clusters"]] == [0, 1]
    assert sum(row["chosen"] for row in found["clusters"]) == len(rows) == 3
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "curation is there already. Move it aside" in again.output


def test_a_missing_extra_is_named(run, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BadInput, match=r"needs datasketch. Install it: pip install -e '\.\[curation\]'"):
        without_duplicates(["a"])
    with pytest.raises(BadInput, match="needs sklearn"):
        cluster(np.eye(2), 2, seed=0)
