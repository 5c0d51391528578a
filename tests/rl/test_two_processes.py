"""Two gloo processes make the updates of one. Run as a script, this file is one of the processes.

Draws are greedy here, so that both ways see the same rollouts; everything else is the trainer as it is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lmkit.training import checkpoint

ROWS = 8
LAUNCH = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def train(model_directory, output_dir):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lmkit.rl.trainer as module
    from lmkit.generation.sampler import sample
    from lmkit.rl.config import PPOConfig

    module.sample = lambda *given, **options: sample(*given, **(options | {"temperature": 0}))
    args = PPOConfig(
        total_episodes=3 * ROWS,
        rollout_batch_size=ROWS,
        per_device_train_batch_size=3,
        num_ppo_epochs=2,
        learning_rate=1e-3,
        adam_epsilon=1e-3,
        max_new_tokens=8,
        temperature=1.0,
        adaptive_kl_target=0.5,
        entropy_coef=0.01,
        whiten_rewards=True,
        save_steps=1,
    )
    prompts = [{"prompt": " ".join(f"w{(i * k + i) % 20}" for k in range(1, 2 + i % 4))} for i in range(11)]
    trainer = module.PPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_directory),
        reward=lambda prompts, completions: [float(len(set(text)) % 5) for text in completions],
        args=args,
        train_dataset=Dataset.from_list(prompts),
        eval_dataset=Dataset.from_list(prompts[:5]),
        evaluation=lambda rows, texts: {"num": len(rows), "first": float(prompts.index(rows[0]))},
        processing_class=AutoTokenizer.from_pretrained(model_directory),
        output_dir=output_dir,
    )
    trainer.train()
    return trainer


def test_two_processes_are_one(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    train(tmp_path / "model", tmp_path / "one")
    command = [str(Path(sys.executable).parent / LAUNCH[0]), *LAUNCH[1:], __file__, str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (checkpoint.load(tmp_path / name / "checkpoints" / "step-000003") for name in ("one", "two"))
    for name, tensor in one[0]["model"].items():
        assert torch.allclose(two[0]["model"][name], tensor, atol=1e-5), name
    assert abs(one[1]["kl_coef"] - two[1]["kl_coef"]) < 1e-6
    assert one[1]["kl_coef"] != 0.05
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 4
    how_it_was_cut = ("seconds", "tokens_per_second", "rollout/pad_waste", "rollout/unique_frac")
    for row, other in zip(*logs):
        assert row.keys() == other.keys()
        for name in row:
            if not name.startswith(("time/", "perf/", *how_it_was_cut)):
                assert abs(row[name] - other[name]) < 1e-4, name


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    trainer = train(folder / "model", folder / "two")
    assert trainer.accelerator.num_processes == 2
