"""Tasks of test_ppo.py: PPO on a small model in all its modes, in as many processes as there are."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from lmkit.data.encode import encode_demonstrations
from lmkit.errors import BadInput, Interrupted
from lmkit.rl.config import PPOConfig
from lmkit.rl.trainer import PPOTrainer
from lmkit.training import sharding
from tests.generation import vllm_standin
from tests.rl.conftest import SIZES, word_tokenizer

ROWS = Dataset.from_list([{"prompt": " ".join(f"w{(i * k + i) % 20}" for k in range(1, 2 + i % 4))} for i in range(11)])
TEXT = Dataset.from_list([{"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2} w{i}"} for i in range(5)])
BASE = {"total_episodes": 16, "rollout_batch_size": 8, "num_mini_batches": 3, "num_ppo_epochs": 2}
BASE |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_new_tokens": 8}
BASE |= {"temperature": 1.0, "adaptive_kl_target": 0.5, "whiten_rewards": True, "save_steps": 1, "bf16": False}


def save_models(folder):
    """A policy and a reward model with their tokenizer, the same for all modes."""
    tokenizer = word_tokenizer()
    kinds = {"policy": (Qwen3ForCausalLM, {"tie_word_embeddings": True})}
    kinds["reward"] = (Qwen3ForSequenceClassification, {"num_labels": 1})
    for name, (kind, options) in kinds.items():
        torch.manual_seed(len(name))
        kind(Qwen3Config(**SIZES, **options)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def lengths_and_letters(prompts, completions):
    return [float(len(set(text)) % 5) for text in completions]


def ppo(models, directory, stop_after=None, lora=None, ptx=False, reward=lengths_and_letters, eval_rows=1, **options):
    """Trains in `directory`; the main process leaves the models in result.pt. By default one row is evaluated."""
    AcceleratorState._reset_state()
    torch.manual_seed(int(os.environ.get("RANK", 0)))  # adapters start as those of the first process
    asked, gatherings, fill = [], [], sharding.fill
    sharding.fill = lambda *given: gatherings.append(1) or fill(*given)
    tokenizer = AutoTokenizer.from_pretrained(models / "policy")
    with contextlib.suppress(Interrupted):
        trainer = PPOTrainer(
            AutoModelForCausalLM.from_pretrained(models / "policy"),
            reward=reward if callable(reward) else models / reward,
            args=PPOConfig(**BASE | options),
            train_dataset=ROWS,
            eval_dataset=ROWS.select(range(eval_rows)),
            evaluation=lambda rows, texts: {"num": len(rows), "letters": sum(map(len, texts))},
            processing_class=tokenizer,
            peft_config=LoraConfig(**lora) if lora else None,
            ptx_dataset=encode_demonstrations(TEXT, tokenizer, 64)[0] if ptx else None,
            value_model=AutoModelForSequenceClassification.from_pretrained(models / "reward")
            if options.get("critic") == "separate" and not lora
            else None,
            output_dir=directory,
            say=lambda text: None,
            stop_requested=lambda: asked.append(1) or len(asked) == stop_after,
        )
        if sharding.is_empty(trainer.actor_critic):
            with pytest.raises(BadInput, match="can be saved, after train"):
                trainer.save_model(directory / "early")
        trainer.train(resume_from_checkpoint=True)
        result = {"policy": trainer.roles.plain_policy().state_dict(), "gatherings": len(gatherings)}
        if trainer.args.advantage_estimator == "gae":
            result["critic"] = trainer.roles.plain_critic().state_dict()
        if trainer.accelerator.is_main_process:
            torch.save(result | {"kl_coef": trainer.kl_coef}, Path(directory) / "result.pt")
    sharding.fill = fill


def by_server(models, directory, address, group_port, **options):
    """`ppo` with a stand-in for a vLLM server, which another process runs."""
    options |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": address}
    with vllm_standin.installed():
        ppo(models, directory, vllm_group_port=group_port, importance_sampling_cap=2.0, **options)


def runs(models, folder, cases):
    """Several runs after each other in the same processes: name -> options of `ppo`."""
    for name, options in cases.items():
        ppo(models, folder / name, **options)
