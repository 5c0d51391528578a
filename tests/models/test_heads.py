import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from lmkit.models.heads import (
    ValueHead,
    classifier_from,
    completion_scores,
    last_token_scores,
    token_scores,
    value_model_from,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1, "initializer_range": 0.3}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "num_labels": 1}


def models():
    torch.manual_seed(0)
    yield Qwen3ForSequenceClassification(Qwen3Config(**SIZES, head_dim=16)).eval()
    yield LlamaForSequenceClassification(LlamaConfig(**SIZES)).eval()
    yield GPT2ForSequenceClassification(GPT2Config(**GPT2)).eval()


@pytest.fixture(params=["qwen3", "llama", "gpt2"])
def model(request):
    return dict(zip(["qwen3", "llama", "gpt2"], models()))[request.param]


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (n,), generator=generator).tolist() for n in (5, 11, 1, 8, 30, 8)]


@torch.no_grad()
def test_scores_are_the_models_own(model, sequences):
    """Alone in a batch and without padding the stock forward has nothing to get wrong."""
    expected = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in sequences])
    assert torch.allclose(last_token_scores(model, sequences, batch_size=4), expected, atol=1e-5)


def test_score_does_not_depend_on_the_batch(model, sequences):
    alone = torch.cat([last_token_scores(model, [ids]) for ids in sequences])
    for batch_size in (1, 2, 6):
        assert torch.allclose(last_token_scores(model, sequences, batch_size), alone, atol=1e-5)


def test_a_last_token_equal_to_pad_is_scored(model, sequences):
    """The stock forward would take the token before it."""
    ended = [[*ids, 0] for ids in sequences]
    with torch.no_grad():
        expected = torch.stack([token_scores(model, torch.tensor([ids]))[0, -1] for ids in ended])
    scores = last_token_scores(model, ended)
    assert torch.allclose(scores, expected, atol=1e-5)
    assert (scores - last_token_scores(model, sequences)).abs().min() > 1e-4


@torch.no_grad()
def test_left_padding_with_a_mask_gives_the_same_scores():
    model = next(models())
    ids = torch.randint(1, 50, (1, 7))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    assert torch.allclose(token_scores(model, padded, mask)[:, 3:], token_scores(model, ids), atol=1e-5)


def test_scoring_keeps_the_mode_and_makes_no_graph(model, sequences):
    model.train()
    assert not last_token_scores(model, sequences).requires_grad
    assert model.training


def ids_of(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 50, (n,), generator=generator).tolist() for n in lengths]  # 0 is the pad id


def tokens_run(model, monkeypatch):
    """A list that collects the shapes of what the backbone is given."""
    shapes, forward = [], model.base_model.forward
    keep = lambda *args, **kwargs: shapes.append(tuple(kwargs["input_ids"].shape)) or forward(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(model.base_model, "forward", keep)
    return shapes


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_shared_prompt_is_run_once_and_changes_no_score(model, batch_size, monkeypatch):
    first, second, third = ids_of(12, 7, 12)
    prompts = [first, second, first, third, first, second, third]
    completions = ids_of(3, 1, 5, 2, 4, 4, 1)
    model.config.score_mean = 0.5
    apart = last_token_scores(model, [p + c for p, c in zip(prompts, completions)])
    shapes = tokens_run(model, monkeypatch)
    model.train()
    together = completion_scores(model, prompts, completions, batch_size)
    assert model.training
    assert torch.allclose(together, apart, atol=1e-5)
    if batch_size == 64:
        assert shapes == [(3, 12), (7, 5)]


def test_padding_behind_a_completion_needs_no_position():
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2, n_positions=24)).eval()
    long, short = ids_of(20, 2)
    prompts, completions = [long, long, long, short], ids_of(1, 2, 4, 18)
    apart = last_token_scores(model, [p + c for p, c in zip(prompts, completions)])
    assert torch.allclose(completion_scores(model, prompts, completions), apart, atol=1e-5)


def test_prompts_that_are_not_shared_are_scored_with_their_completions(model, monkeypatch):
    prompts, completions = ids_of(12, 7, 12), ids_of(3, 1, 5)
    shapes = tokens_run(model, monkeypatch)
    scores = completion_scores(model, prompts, completions)
    assert shapes == [(3, 17)]
    assert torch.equal(scores, last_token_scores(model, [p + c for p, c in zip(prompts, completions)]))


def test_an_empty_completion_or_prompt_is_scored_whole(model):
    prompts, completions = [[1, 2, 3, 4]] * 3 + [[]], [[5], [], [6], [7]]
    expected = last_token_scores(model, [p + c for p, c in zip(prompts, completions)])
    assert torch.equal(completion_scores(model, prompts, completions), expected)


def test_empty_sequence_is_named(model):
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        last_token_scores(model, [[1], []])


def test_a_model_that_is_no_scalar_classifier_is_refused():
    torch.manual_seed(0)
    many = Qwen3ForSequenceClassification(Qwen3Config(**{**SIZES, "num_labels": 3}, head_dim=16))
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    bert = BertForSequenceClassification(config)
    for wrong, found in ((many, "out_features=3"), (bert, "no layer `score`")):
        with pytest.raises(ValueError, match=f"{found}.*num_labels=1"):
            token_scores(wrong, torch.tensor([[1, 2]]))


def test_head_starts_at_zero_and_stays_in_float32_under_autocast():
    head, hidden = ValueHead(32), torch.randn(2, 5, 32)
    assert (head(hidden) == 0).all()
    with torch.no_grad():
        head.weight.normal_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden.bfloat16())
    assert values.dtype == torch.float32
    assert torch.equal(values, hidden.bfloat16().float() @ head.weight[0])


@torch.no_grad()
def test_shared_critic_as_a_directory_gives_the_same_values(tmp_path):
    policy, head = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)).eval(), ValueHead(32)
    head.weight.normal_()
    classifier_from(policy, head).save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(1, 50, (3, 7))
    expected = head(policy.model(ids).last_hidden_state)
    assert torch.allclose(token_scores(loaded.eval(), ids), expected, atol=1e-5)


def test_critic_from_a_frozen_reward_model_is_its_own(model):
    critic = value_model_from(model.requires_grad_(False))
    assert all(parameter.requires_grad for parameter in critic.parameters())
    with torch.no_grad():
        critic.score.weight.add_(1)
    assert not torch.equal(critic.score.weight, model.score.weight)
