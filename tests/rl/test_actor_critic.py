import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from lmkit.errors import BadInput
from lmkit.models.heads import ValueHead, token_scores
from lmkit.rl.actor_critic import ActorCritic, check_policy, disable_dropout, target_logprobs


@pytest.fixture
def rows():
    """Two rows of three and four prompt tokens, three and one completion tokens; the last is never an input."""
    input_ids = torch.tensor([[21, 22, 23, 24, 25], [31, 32, 33, 34, 0]])
    before = torch.tensor([[False, False, True, True, True], [False, False, False, True, False]])
    return input_ids, before, torch.tensor([24, 25, 2, 2])


@pytest.fixture
def shared(policy):
    head = ValueHead(32)
    torch.nn.init.normal_(head.weight)
    return ActorCritic(policy, head)


@torch.no_grad()
def test_numbers_are_the_models_own(shared, rows):
    input_ids, before, targets = rows
    logprobs, values, entropies = shared(*rows, 0.7, True)
    distribution = (shared.policy(input_ids).logits[before] / 0.7).log_softmax(-1)
    assert torch.allclose(logprobs, distribution.gather(1, targets[:, None]).squeeze(1), atol=1e-5)
    assert torch.allclose(entropies, torch.distributions.Categorical(logits=distribution).entropy(), atol=1e-5)
    hidden = shared.policy.model(input_ids).last_hidden_state[before]
    assert torch.allclose(values, hidden @ shared.critic.weight[0], atol=1e-5)
    assert torch.allclose(target_logprobs(shared.policy, *rows, 0.7), logprobs, atol=1e-6)


@torch.no_grad()
def test_a_separate_critic_scores_each_prefix(policy, reward_model, rows):
    values = ActorCritic(policy, reward_model)(*rows, 1.0, False)[1]
    assert torch.allclose(values, token_scores(reward_model, rows[0])[rows[1]], atol=1e-6)


@torch.no_grad()
def test_numbers_do_not_depend_on_the_padding(shared, rows):
    expected = shared(*rows, 1.0, True)
    wider = [torch.cat([table, table.new_full((2, 6), fill)], 1) for table, fill in zip(rows, (5, 0))]
    for found, wanted in zip(shared(*wider, rows[2], 1.0, True), expected):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_gradient_is_0_at_inputs_after_the_last_target_and_at_padding(shared, rows):
    """The loss reads no logits of the prompt and nothing of padding; the stop token's own position counts."""
    embedded = shared.policy.get_input_embeddings()
    seen = []
    handle = embedded.register_forward_hook(lambda m, i, out: seen.append(out) or out.retain_grad())
    logits = []
    head = shared.policy.get_output_embeddings()
    other = head.register_forward_hook(lambda m, i, out: logits.append(out) or out.retain_grad())
    logprobs, values, _ = shared(*rows, 1.0, False)
    (logprobs.sum() + values.sum()).backward()
    handle.remove(), other.remove()
    assert (seen[0].grad[1, 4] == 0).all()
    assert (seen[0].grad[1, :4] != 0).any(-1).all()
    assert len(logits[0]) == len(rows[2])  # no logits exist at prompt or padding
    assert (logits[0].grad != 0).any(-1).all()  # the stop tokens, targets 2 and 3, are among them


@pytest.mark.parametrize("mode", [True, False])
def test_forward_twice_is_equal_to_the_bit_with_dropout_in_the_config(rows, mode):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    model = ActorCritic(GPT2LMHeadModel(config), ValueHead(32)).train(mode)
    disable_dropout(model)
    first, second = (model(*rows, 1.0, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_functional_attention_dropout_is_off_too(rows, make_policy):
    """Qwen3 reads the probability as a plain attribute; no nn.Dropout is involved."""
    model = ActorCritic(make_policy(attention_dropout=0.3), ValueHead(32)).train()
    assert not torch.equal(model(*rows, 1.0, False)[0], model(*rows, 1.0, False)[0])
    disable_dropout(model)
    assert torch.equal(model(*rows, 1.0, False)[0], model(*rows, 1.0, False)[0])


def test_gradient_checkpointing_changes_no_bit(shared, rows):
    disable_dropout(shared)
    plain = shared.train()(*rows, 1.0, False)[0]
    shared.policy.gradient_checkpointing_enable()
    assert torch.equal(shared(*rows, 1.0, False)[0], plain)


def test_logprobs_and_values_are_float32_under_autocast(shared, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = shared(*rows, 1.0, True)
    with torch.no_grad():
        exact = shared(*rows, 1.0, True)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert (found[0] - exact[0]).abs().max() < 0.3


def test_value_loss_alone_reaches_the_policy_only_through_the_backbone(shared, rows):
    shared.policy.lm_head = torch.nn.Linear(32, 64, bias=False)
    shared(*rows, 1.0, False)[1].sum().backward()
    assert shared.policy.lm_head.weight.grad is None
    assert shared.policy.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_models_that_change_their_logits_afterwards_are_refused(policy):
    check_policy(policy, "the policy")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=0.5, initializer_range=0.5
    )
    with pytest.raises(BadInput, match="the policy is a Gemma2ForCausalLM, whose logits are not"):
        check_policy(Gemma2ForCausalLM(config), "the policy")
