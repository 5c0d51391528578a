"""lm-evaluation-harness reads a model directory as it is, and gives the bits per byte that lmkit does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmkit.evaluation.bits_per_byte import bits_per_byte
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.chat import encode_text
from lmkit.tokenization.train import train_tokenizer

TASKS = Path(__file__).parents[2] / "benchmarks" / "lm_eval"
TEXTS = ["The owl had a drum, and the caf\u00e9 was shut. \n" * 9, "A bell!", "  The fox gave the owl a bell; " * 7]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e .[eval]"
    ),
]


def test_bits_per_byte_agree_at_equal_windows(tmp_path):
    tokenizer = train_tokenizer(lambda: TEXTS * 3, vocab_size=384, allow_smaller_vocab=True)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano", context_length=32), tokenizer)
    model.get_input_embeddings().weight.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "held_out", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},max_length=32", "--batch_size", "4"]
    command += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["held_out"]
    nats = num_bytes = 0.0
    for text in TEXTS:
        ids = np.array([tokenizer.eos_token_id, *encode_text(tokenizer, text)])
        score = bits_per_byte(model, ids, tokenizer, context_length=32)
        nats, num_bytes = nats + score["bits_per_byte"] * score["num_bytes"], num_bytes + score["num_bytes"]
    assert results["bits_per_byte,none"] == pytest.approx(nats / num_bytes, abs=1e-4)
