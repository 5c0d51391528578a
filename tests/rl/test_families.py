"""PPO and what it is made of take lmkit's own models as they take stock ones: heads, sampler, policy and critic."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from lmkit.errors import BadInput
from lmkit.generation.sampler import sample
from lmkit.generation.vllm import VLLMSampler
from lmkit.models.gguf_file import write_gguf
from lmkit.models.heads import ValueHead, classifier_from, last_token_scores, token_scores
from lmkit.models.load import load_language_model
from lmkit.models.presets import ModelConfig, build_model
from lmkit.models.start import load_to_continue
from lmkit.rl.actor_critic import ActorCritic, check_policy
from lmkit.rl.config import PPOConfig
from lmkit.rl.trainer import PPOTrainer
from lmkit.training.lora import LoraOptions, peft_config
from lmkit.training.losses import CausalLMLoss

WIDE = {"init_std": 0.2}
FAMILIES = {
    "lstm": {"arch": "lstm"},
    "gru": {"arch": "gru", "bptt_tokens": 4},
    "elmo": {"arch": "elmo"},
    "alibi-sandwich": WIDE | {"arch": "transformer", "block": {"positions": "alibi", "norm_placement": "sandwich"}},
    "learned-post": WIDE | {"arch": "transformer", "block": {"positions": "learned", "norm_placement": "post"}},
    "neural-ngram": WIDE | {"arch": "neural_ngram"},
}


@pytest.fixture(params=FAMILIES)
def policy(request, tokenizer):
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"preset": "nano"} | FAMILIES[request.param])
    model = build_model(config, tokenizer).eval()
    with torch.no_grad():  # far from the even distribution of a fresh model
        model.get_input_embeddings().weight.mul_(8)
    return model


def test_log_probabilities_values_and_samples_agree(policy):
    check_policy(policy, "the policy")
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
    before = torch.tensor([[False, True, True, True, True], [False, True, True, False, False]])
    targets = torch.tensor([7, 8, 9, 4, 12, 5])
    head = ValueHead(policy.config.hidden_size)
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        logprobs, values, _ = ActorCritic(policy, head)(ids, before, targets, 0.8, True)
        distribution = (policy(ids, use_cache=False).logits[before] / 0.8).log_softmax(-1)
        alone = torch.cat([policy(ids[:1]).logits[0, 1:], policy(ids[1:, :3]).logits[0, 1:]]) / 0.8
    assert torch.allclose(logprobs, distribution.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(distribution, alone.log_softmax(-1), atol=1e-5)
    critic = classifier_from(policy, head).eval()
    assert torch.allclose(token_scores(critic, ids)[before], values, atol=1e-5)
    prompts = [[5], [6, 7, 8, 9], [10, 11]]
    drawn = sample(policy, prompts, max_new_tokens=5, stop_token_ids=[0], generator=torch.Generator().manual_seed(0))
    for row, prompt in enumerate(prompts):
        new = drawn.ids(row)
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        again = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]
        assert torch.allclose(again, drawn.logprobs[row, : len(new)], atol=1e-5)


def test_a_folder_gives_the_model_back_and_a_reward_model(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_language_model(tmp_path)
    ids = torch.arange(4, 9)[None]
    assert torch.allclose(loaded.eval()(ids).logits, policy(ids).logits, atol=1e-6)
    assert load_to_continue(str(tmp_path), tokenizer, 64).config.model_type == policy.config.model_type
    with pytest.raises(BadInput, match="GGUF export knows llama and qwen3"):
        write_gguf(tmp_path, tmp_path / "model.gguf")
    with pytest.raises(BadInput, match=r"use_vllm: vLLM does not know .*Leave use_vllm out"):
        VLLMSampler(policy, tokenizer)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    torch.nn.init.ones_(reward.score.weight)
    rows = [[5, 6, 7], [8], [9, 10, 11, 12, 3]]
    together = last_token_scores(reward, rows)
    assert torch.allclose(together, torch.cat([last_token_scores(reward, [row]) for row in rows]), atol=1e-5)


def test_loss_is_that_of_the_logits(policy):
    ids, labels = torch.arange(4, 20).view(2, 8), torch.arange(5, 21).view(2, 8)
    labels[0, 5:] = -100
    loss, count = CausalLMLoss(policy)(ids, labels)
    logits = policy(ids, use_cache=False).logits
    assert count == 13
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item(), rel=1e-5
    )


def test_ppo_runs_and_its_first_mini_batch_has_ratio_1(policy, tokenizer, tmp_path):
    options = {"rollout_batch_size": 8, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "num_mini_batches": 2}
    options |= {"learning_rate": 1e-2, "max_new_tokens": 5, "temperature": 1.0, "total_episodes": 16}
    trainer = PPOTrainer(
        policy,
        reward=lambda prompts, completions: [c.count("w3") for c in completions],
        args=PPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(9)]),
        processing_class=tokenizer,
        output_dir=tmp_path,
        say=lambda text: None,
    )
    metrics = trainer.train()
    assert metrics["val/first_ratio_error"] < 1e-5
    assert metrics["sampling/logprob_diff_max"] < 1e-4
    trainer.save_model(tmp_path / "model")
    trainer.save_value_model(tmp_path / "value")
    assert load_language_model(tmp_path / "model")[0].config.model_type == policy.config.model_type


def test_adapters_beside_a_recurrent_net_are_refused(tokenizer):
    model = build_model(ModelConfig(preset="nano", arch="gru"), tokenizer)
    with pytest.raises(BadInput, match=r"lora.r 4: adapters go beside linear layers.*\(gru\).*Leave lora out"):
        peft_config(LoraOptions(r=4), "CAUSAL_LM", model)
