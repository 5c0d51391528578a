"""Who plays what: policy, critic, reference and reward, made of the models that a trainer is given."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmkit.errors import BadInput
from lmkit.models.heads import ValueHead, classifier_from, value_model_from
from lmkit.models.load import load_reward_model
from lmkit.rl.actor_critic import ActorCritic, check_policy, disable_dropout, target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.lora import POLICY, REWARD, VALUE, acting, adapter_classifier, add_adapters, is_adapter, merged
from lmkit.rl.rewards import Reward, check_weights, make_reward, model_scores


@dataclass(frozen=True)
class Roles:
    """The models of a run.

    reference: a frozen model; None: the policy's base, without adapters. lora: the policy with its adapters, if any.
    """

    actor_critic: ActorCritic
    reference: PreTrainedModel | None
    lora: PeftModel | None
    reward: Reward

    def models(self) -> list[PreTrainedModel]:
        """Policy, critic and reference, those that are models of their own."""
        found = (self.actor_critic.policy, self.actor_critic.critic, self.reference)
        return [model for model in found if isinstance(model, PreTrainedModel)]

    def ref_logprobs(self, *inputs: Tensor, temperature: float) -> Tensor:
        """The reference's log-probabilities of the target tokens: see `ActorCritic.forward`. float32 [N]."""
        if self.reference is not None:
            return target_logprobs(self.reference, *inputs, temperature)
        with acting(self.actor_critic.policy, None):
            return target_logprobs(self.actor_critic.policy, *inputs, temperature)

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """Moves the reference's weights `share` of the way to the policy's."""
        for own, other in zip(self.reference.parameters(), self.actor_critic.policy.parameters()):
            own.lerp_(other.to(own), share)

    def plain_policy(self) -> PreTrainedModel:
        """The policy as a stock model, adapters merged into a copy."""
        return self.actor_critic.policy if self.lora is None else merged(self.lora, POLICY)

    def plain_critic(self) -> PreTrainedModel:
        """The critic as a sequence-classification model; a shared one with a copy of the policy's backbone."""
        critic = self.actor_critic.critic
        if critic is None:
            raise BadInput("there is no critic with advantage_estimator rloo, so no value model to save.")
        if not isinstance(critic, ValueHead):
            return critic
        adapter = self.actor_critic.value_adapter or POLICY
        return classifier_from(self.actor_critic.policy if self.lora is None else merged(self.lora, adapter), critic)


def make_roles(
    model: PreTrainedModel,
    reward: Any,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ref_model: PreTrainedModel | None,
    value_model: PreTrainedModel | None,
    peft_config: LoraConfig | None,
    device: torch.device,
) -> Roles:
    """The roles from the arguments of `PPOTrainer`; BadInput for combinations that cannot work."""
    check_policy(model, "the policy")
    model.to(device)
    own_critic = args.advantage_estimator == "gae" and args.critic == "separate"
    if peft_config is not None:
        _check_lora(args, own_critic, ref_model, value_model)
        lora, reference = add_adapters(model, peft_config, own_critic=own_critic), None
        critic = None if args.advantage_estimator == "rloo" else _value_head(model)
    else:
        lora = None
        reference = copy.deepcopy(model) if ref_model is None else ref_model
        if reference is model:
            raise BadInput("ref_model is the model itself, which moves; leave it out for a frozen copy of the start.")
        reference.requires_grad_(False).eval().to(device)
        check_policy(reference, "the reference")
        critic = _critic(model, reward, args, value_model, tokenizer)
    actor_critic = ActorCritic(model, critic, VALUE if lora is not None and own_critic else None).to(device)
    disable_dropout(actor_critic)
    if args.gradient_checkpointing:
        for part in (model, critic):
            if isinstance(part, PreTrainedModel):
                part.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None and isinstance(reward, str | Path) and is_adapter(reward):
        score = _adapter_reward(lora, Path(reward), args)
    else:
        score = make_reward(
            reward,
            tokenizer,
            batch_size=args.generation_batch_size,
            device=device,
            weights=args.reward_weights,
            aggregation=args.reward_aggregation,
            variance_coef=args.reward_variance_coef,
            timeout_seconds=args.reward_timeout_seconds,
            max_retries=args.reward_max_retries,
        )
    return Roles(actor_critic, reference, lora, score)


def _check_lora(args, own_critic, ref_model, value_model):
    if ref_model is not None or value_model is not None:
        name = "value_model" if ref_model is None else "ref_model"
        raise BadInput(f"peft_config and {name} are both given; with LoRA the one frozen base serves as both of them.")
    if args.use_vllm:
        raise BadInput("peft_config and use_vllm: the engine takes whole weights; leave one of them out.")
    if args.ref_model_mixup_alpha:
        raise BadInput(
            f"peft_config and ref_model_mixup_alpha {args.ref_model_mixup_alpha}: with LoRA the reference is the "
            "frozen base, which cannot move; leave one of them out."
        )
    if own_critic and args.gradient_checkpointing:
        raise BadInput(
            "peft_config, critic separate and gradient_checkpointing: what is computed again in the backward would see "
            "the wrong adapter; set critic to shared, or leave gradient_checkpointing out."
        )


def _value_head(model):
    return ValueHead(model.config.get_text_config().hidden_size)


def _critic(model, reward, args, value_model, tokenizer):
    if args.advantage_estimator == "rloo" or args.critic == "shared":
        if value_model is not None:
            why = "critic is shared" if args.critic == "shared" else "advantage_estimator is rloo"
            raise BadInput(f"value_model is given and {why}; set critic to separate, or leave value_model out.")
        return _value_head(model) if args.advantage_estimator == "gae" else None
    if value_model is not None:
        rewards = reward if isinstance(reward, list | tuple) else [reward]
        if any(value_model is other for other in (model, *rewards)):
            raise BadInput(
                "value_model is the policy or a reward model itself; the critic has weights of its own: pass a copy."
            )
        return value_model.requires_grad_(True)
    if isinstance(reward, str | Path) and Path(reward).is_dir():
        critic, own = load_reward_model(Path(reward))
        if own.get_vocab() != tokenizer.get_vocab():
            raise BadInput(
                f"critic is separate, but the reward model {reward} has another vocabulary than the policy, whose "
                "ids a critic reads; pass value_model or use shared."
            )
        return critic
    if isinstance(reward, PreTrainedModel):
        return value_model_from(reward)
    raise BadInput("critic is separate, but the reward is no model to start it from; pass value_model or use shared.")


def _adapter_reward(lora, directory, args):
    check_weights(1, args.reward_weights, args.reward_aggregation)
    classifier, name = adapter_classifier(lora, directory), str(directory)

    def score(batch):
        with acting(classifier, REWARD):
            return model_scores(classifier, batch.ids, args.generation_batch_size, name)

    return Reward({name: score}, {}, args.reward_weights, args.reward_aggregation, args.reward_variance_coef)
