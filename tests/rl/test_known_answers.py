"""Sequence tasks small enough to list every completion: the optimum of E[reward] - kl_coef KL, and how near PPO comes.

The policy is a language model over six letters; the prompt is one token. Everything but the loop is the library's.
"""

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

import lmkit.rl.update
from lmkit.generation.sampler import sample
from lmkit.models.heads import ValueHead, token_scores
from lmkit.rl.actor_critic import ActorCritic, target_logprobs
from lmkit.rl.config import PPOConfig
from lmkit.rl.kl import kl_per_token
from lmkit.rl.rollout import collect
from lmkit.rl.update import advantages_and_returns, make_optimizer, update

PROMPT, NUM_LETTERS, LENGTH, STOP = 6, 6, 3, 5


def make_config(width, depth):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth, "head_dim": 16}
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 16, "num_labels": 1}
    return Qwen3Config(
        vocab_size=7, tie_word_embeddings=False, initializer_range=0.2, pad_token_id=None, **sizes, **heads
    )


def make_policy(seed, width, depth):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config(width, depth))
    model.lm_head = Letters(model.lm_head)
    return model


class Letters(torch.nn.Module):
    """An output layer that can never draw the prompt's token."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, hidden):
        logits = self.layer(hidden)
        return logits.index_fill(-1, torch.tensor([PROMPT]), float("-inf"))


def all_completions(stops):
    """Every completion of LENGTH letters; with stop letters, also the shorter ones that end with one."""
    going_on = [letter for letter in range(NUM_LETTERS) if letter not in stops]
    ended = [[*c, stop] for stop in stops for n in range(LENGTH) for c in itertools.product(going_on, repeat=n)]
    return ended + [list(c) for c in itertools.product(going_on, repeat=LENGTH)]


def reward_table(seed):
    """A reward between 0 and 2 for each completion, drawn at random."""
    table = torch.rand(7, 7, 7, generator=torch.Generator().manual_seed(100 + seed)) * 2
    return lambda completion: table[tuple(completion + [6] * (LENGTH - len(completion)))].item()


@torch.no_grad()
def completion_logprobs(model, completions):
    """Log probability of each whole completion: [N]."""
    result = torch.empty(len(completions))
    for length in {len(c) for c in completions}:
        index = [i for i, c in enumerate(completions) if len(c) == length]
        targets = torch.tensor([completions[i] for i in index])
        ids = torch.cat([torch.full((len(index), 1), PROMPT), targets], 1)[:, :-1]
        logprobs = target_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool), targets.flatten(), 1.0)
        result[index] = logprobs.view(len(index), length).sum(1)
    return result


def train(policy, critic, reward, args, iterations, seed, stops):
    """PPO by the library's functions alone, in time or one iteration late. Returns the frozen reference."""
    reference = copy.deepcopy(policy).requires_grad_(False).eval()
    model = ActorCritic(policy, critic)
    optimizer, accelerator = make_optimizer(model, args), Accelerator()
    sampling, shuffling = (torch.Generator().manual_seed(seed * 2 + i) for i in range(2))
    size, steps = args.rollout_batch_size, args.num_ppo_epochs * args.num_mini_batches
    options = {"max_new_tokens": LENGTH, "stop_token_ids": stops, "generator": sampling, "batch_size": size}
    ahead = None
    for iteration in range(iterations):
        drawn = sample(policy, [[PROMPT]] * size, **options) if ahead is None else ahead
        ahead = sample(policy, [[PROMPT]] * size, **options) if args.one_step_off_policy else None
        rollout, _ = collect(
            [[PROMPT]] * size,
            lambda prompts, drawn=drawn: drawn,
            lambda *inputs: model(*inputs, 1.0, True),
            lambda *inputs: (target_logprobs(reference, *inputs, 1.0),),
            lambda completions: lambda: torch.tensor([reward(c) for c in completions]),
            size,
        )
        advantages, returns = advantages_and_returns(rollout, args, args.kl_coef)
        rates = [1 - (iteration * steps + step) / (iterations * steps) for step in range(steps)]
        options_of_update = {"model": model, "optimizer": optimizer, "config": args, "rates": rates}
        options_of_update["kl_coef"] = args.kl_coef
        update(rollout, advantages, returns, **options_of_update, accelerator=accelerator, generator=shuffling)
    return reference


def distance_from_optimum(seed, stops, iterations, args, width, depth):
    """(gap, total variation) after PPO, against pi* = ref exp(reward / kl_coef), normalised.

    gap: (J* - J) / (J* - J of the reference): 0 at the optimum, 1 where nothing was learnt.
    """
    policy, reward = make_policy(seed, width, depth), reward_table(seed)
    reference = train(policy, ValueHead(width), reward, args, iterations, seed, stops)
    completions = all_completions(stops)
    unended = torch.tensor([float(c[-1] not in stops) for c in completions])
    rewards = torch.tensor([reward(c) for c in completions]) - args.missing_eos_penalty * unended
    ref, found = completion_logprobs(reference, completions), completion_logprobs(policy, completions)
    assert ref.exp().sum().item() == pytest.approx(1, abs=1e-5)
    tilted = ref + rewards / args.kl_coef
    best, best_objective = tilted.softmax(0), args.kl_coef * tilted.logsumexp(0)
    objectives = [(p.exp() * (rewards - args.kl_coef * (p - ref))).sum() for p in (found, ref)]
    gap = (best_objective - objectives[0]) / (best_objective - objectives[1])
    return gap.item(), (found.exp() - best).abs().sum().item() / 2


def settings(stops, **options):
    base = {"rollout_batch_size": 512, "per_device_train_batch_size": 512, "learning_rate": 1e-3, "kl_coef": 0.7}
    return PPOConfig(**(base | {"missing_eos_penalty": 0.5 if stops else 0.0, "temperature": 1.0} | options))


@pytest.mark.parametrize("late", [False, True])
def test_ppo_nears_the_exact_optimum(late):
    """Completions of one to three letters: endings, KL and the missing-EOS penalty must all be accounted for."""
    options = {"one_step_off_policy": True, "importance_sampling_cap": 2.0} if late else {}
    args = settings([STOP], learning_rate=5e-3, **options)
    gap, variation = distance_from_optimum(0, [STOP], 60, args, width=16, depth=1)
    assert gap <= 0.1
    assert variation <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[], [STOP]], ids=["fixed length", "with endings"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_the_exact_optimum(stops, seed):
    gap, variation = distance_from_optimum(seed, stops, 150, settings(stops), width=32, depth=2)
    assert gap <= 0.02
    assert variation <= 0.05


def test_k3_in_the_reward_ends_worse_than_it_began(monkeypatch):
    """The negative control: an estimate of the KL that may not stand in the reward."""
    monkeypatch.setattr(lmkit.rl.update, "kl_per_token", lambda p, q, _: kl_per_token(p, q, "k3"))
    gap, _ = distance_from_optimum(0, [], 30, settings([], learning_rate=5e-3), width=16, depth=1)
    assert gap > 1


def test_critic_learns_the_exact_expected_return():
    """The policy stands still; V of each prefix is known by listing what can follow it."""
    policy = make_policy(0, 16, 1)
    torch.manual_seed(1)
    critic = Qwen3ForSequenceClassification(make_config(32, 1))
    worth = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.7], [0.4]])
    frozen = {"learning_rate": 1e-12, "value_learning_rate": 1e-2, "kl_coef": 0.0, "num_ppo_epochs": 2}

    def reward(completion):
        return sum(worth[place, letter] for place, letter in enumerate(completion)).item()

    train(policy, critic, reward, settings([], **frozen, vf_coef=1.0, cliprange_value=10.0), 60, 0, [])
    completions = all_completions([])
    weights = completion_logprobs(policy, completions).exp()
    rewards = torch.tensor([reward(c) for c in completions])
    expected, found, masses = [], [], []
    for length in range(LENGTH):
        for prefix in itertools.product(range(NUM_LETTERS), repeat=length):
            follows = torch.tensor([tuple(c[:length]) == prefix for c in completions])
            masses.append(weights[follows].sum())
            expected.append((weights * rewards)[follows].sum() / masses[-1])
            with torch.no_grad():
                found.append(token_scores(critic.eval(), torch.tensor([[PROMPT, *prefix]]))[0, -1])
    expected, found, masses = torch.stack(expected), torch.stack(found), torch.stack(masses) / LENGTH
    mean = (masses * expected).sum()
    unexplained = (masses * (found - expected) ** 2).sum() / (masses * (expected - mean) ** 2).sum()
    assert 1 - unexplained >= 0.98
