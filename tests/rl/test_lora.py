import copy

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores, token_scores
from lmkit.rl.actor_critic import target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.lora import POLICY, VALUE, acting
from lmkit.rl.trainer import PPOTrainer

ROWS = Dataset.from_dict({"prompt": [" ".join(f"w{(i * k) % 20}" for k in range(1, 3 + i % 4)) for i in range(10)]})
IDS = torch.tensor([[21, 22, 23, 24]])


def lora(**options):
    # Both matrices start away from 0, so that an adapter that acts is seen at once.
    return LoraConfig(**({"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options))


@pytest.fixture
def make(policy, tokenizer, tmp_path):
    def build(model=policy, reward=lambda prompts, completions: [float(len(c)) for c in completions], **options):
        given = {name: options.pop(name) for name in ("peft_config", "ref_model", "value_model") if name in options}
        base = {"total_episodes": 16, "rollout_batch_size": 8, "max_new_tokens": 6, "learning_rate": 1e-2}
        return PPOTrainer(
            model,
            reward,
            PPOConfig(**(base | options)),
            ROWS,
            processing_class=tokenizer,
            output_dir=tmp_path / "run",
            say=lambda text: None,
            **({"peft_config": lora()} | given),
        )

    return build


def adapter_tensors(model, name):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if f".{name}." in n])


def test_adapters_that_start_at_0_make_no_kl_and_the_reference_is_the_base_throughout(make, policy):
    start = copy.deepcopy(policy)
    trainer = make(peft_config=lora(init_lora_weights=True))
    rollout, _ = trainer.collect(trainer.train_prompts, range(8), "sampling")
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() < 1e-5
    trainer.train()
    rollout, _ = trainer.collect(trainer.train_prompts, range(8), "sampling")
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 1e-3
    with torch.no_grad():
        expected = target_logprobs(start, *rollout.model_inputs(), trainer.args.temperature)
    assert torch.allclose(rollout.ref_logprobs[rollout.mask], expected, atol=1e-6)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_one_base_is_in_memory_and_adapters_alone_are_trained(make, policy, critic):
    num_base = sum(p.numel() for p in policy.parameters())
    trainer = make(critic=critic)
    base = {n: p.clone() for n, p in trainer.actor_critic.named_parameters() if not p.requires_grad}
    small = {n: p.numel() for n, p in trainer.actor_critic.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in base.values()) == num_base
    assert trainer.roles.reference is None
    assert sum(small.values()) < num_base / (1 if critic == "separate" else 2)
    assert all(".lora_" in name or name == "critic.weight" for name in small)
    before = adapter_tensors(trainer.actor_critic, POLICY)
    trainer.train()
    assert all(torch.equal(p, base[n]) for n, p in trainer.actor_critic.named_parameters() if n in base)
    assert not torch.equal(adapter_tensors(trainer.actor_critic, POLICY), before)
    assert (trainer.actor_critic.critic.weight != 0).any()
    assert sum(len(s) > 0 for s in trainer.optimizer.state.values()) == len(small)


def test_the_critics_own_adapter_learns_from_the_value_loss_alone(make):
    trainer = make(critic="separate")
    model = trainer.actor_critic
    model.critic.weight.data.fill_(0.1)
    before = torch.ones_like(IDS, dtype=torch.bool)
    model(IDS, before, IDS[0], 1.0, False)[1].sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert touched
    assert all(f".{VALUE}." in n or n == "critic.weight" for n in touched)
    model.zero_grad()
    model(IDS, before, IDS[0], 1.0, False)[0].sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert touched
    assert all(f".{POLICY}." in n for n in touched)
    groups = model.parameter_groups()
    assert [sum(p.numel() for p in group) for group in groups] == [
        len(adapter_tensors(model, POLICY)),
        len(adapter_tensors(model, VALUE)) + model.critic.weight.numel(),
    ]


def test_which_adapter_acts_leaves_gradients_switched_as_they_were(make):
    trainer = make(critic="separate")
    model = trainer.actor_critic.policy
    flags = [p.requires_grad for p in model.parameters()]
    outputs = {}
    for name in (None, POLICY, VALUE):
        with acting(model, name), torch.no_grad():
            outputs[name] = model(IDS).logits
            assert [p.requires_grad for p in model.parameters()] == flags
    assert not torch.allclose(outputs[None], outputs[POLICY], atol=1e-4)
    assert not torch.allclose(outputs[VALUE], outputs[POLICY], atol=1e-4)
    assert torch.equal(model(IDS).logits, outputs[POLICY])


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_saved_models_are_plain_and_say_what_the_adapted_ones_do(make, tmp_path, critic):
    trainer = make(critic=critic)
    trainer.train()
    trainer.save_model()
    trainer.save_value_model(tmp_path / "critic")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    assert not any("lora" in name for name in [*policy.state_dict(), *value.state_dict()])
    own = trainer.actor_critic.eval()
    with torch.no_grad():
        assert torch.allclose(policy(IDS).logits, own.policy(IDS).logits, atol=1e-5)
        values = own(IDS, torch.ones_like(IDS, dtype=torch.bool), IDS[0], 1.0, False)[1]
        assert torch.allclose(token_scores(value, IDS)[0], values, atol=1e-5)


@pytest.fixture
def reward_adapter(policy, tokenizer, tmp_path):
    """The folder of a reward model that is an adapter of the policy's base, and the whole model it stands for."""
    policy.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted = get_peft_model(whole, lora(task_type="SEQ_CLS", modules_to_save=["score"]))
    adapted.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward", adapted.merge_and_unload().eval()


def test_a_reward_that_is_an_adapter_of_the_base_needs_no_second_base(make, reward_adapter, tmp_path):
    folder, whole = reward_adapter
    trainer = make(model=str(tmp_path / "base"), reward=folder, critic="separate", reward_weights=[2.0])
    learning = {n for n, p in trainer.actor_critic.policy.named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in learning} == {"policy", "value"}
    assert len(trainer.optimizer.param_groups) == 2
    assert min(len(group["params"]) for group in trainer.optimizer.param_groups) > 1
    num_parameters = sum(p.numel() for p in trainer.actor_critic.policy.parameters() if not p.requires_grad)
    rollout, _ = trainer.collect(trainer.train_prompts, range(8), "sampling")
    ids = [
        trainer.train_prompts.ids[row] + rollout.completion_ids[row, : rollout.completion_lengths[row]].tolist()
        for row in range(8)
    ]
    assert torch.allclose(rollout.scores, 2 * last_token_scores(whole, ids), atol=1e-5)
    assert rollout.scores.std() > 0
    base = sum(p.numel() for p in whole.base_model.parameters())
    assert num_parameters < 2 * base
    trainer.train()
    again, _ = trainer.collect(trainer.train_prompts, range(8), "evaluation")
    assert len(again.scores) == 8


def test_what_lora_cannot_do_is_refused(make, make_policy, reward_adapter, reward_model):
    folder, _ = reward_adapter
    with pytest.raises(BadInput, match="peft_config and ref_model are both given"):
        make(ref_model=make_policy())
    with pytest.raises(BadInput, match="peft_config and value_model are both given"):
        make(value_model=reward_model, critic="separate")
    with pytest.raises(BadInput, match=r"peft_config and ref_model_mixup_alpha 0\.1"):
        make(ref_model_mixup_alpha=0.1)
    with pytest.raises(BadInput, match="peft_config, critic separate and gradient_checkpointing"):
        make(critic="separate", gradient_checkpointing=True)
    with pytest.raises(BadInput, match=r"peft_config has modules_to_save \['lm_head'\]"):
        make(peft_config=lora(modules_to_save=["lm_head"]))
    for options in ({"bias": "all"}, {"init_lora_weights": "pissa"}):
        with pytest.raises(BadInput, match="others move the base, which is the reference"):
            make(peft_config=lora(**options))
    with pytest.raises(BadInput, match="1 rewards with 2 reward_weights"):
        make(model=str(folder.parent / "base"), reward=folder, reward_weights=[1.0, 2.0])
    with pytest.raises(BadInput, match=r"peft_config is IA3Config; wanted a peft.LoraConfig"):
        make(peft_config=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    other = make_policy()
    other.name_or_path = "elsewhere"
    with pytest.raises(BadInput, match=r"is an adapter of .*base, and the policy's base is elsewhere"):
        make(model=other, reward=folder)
