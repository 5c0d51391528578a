import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lmkit.errors import BadInput
from lmkit.generation.sampler import Stops, _sample_batch, draw, sample

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.3}
ARCHITECTURES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
}
STOPS = [2, 7]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ARCHITECTURES["qwen3"]().eval()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(8, 40, (n,), generator=generator).tolist() for n in (3, 9, 1, 5, 5, 14, 2, 7)]


def run(model, prompts, seed=0, **options):
    options = {"max_new_tokens": 12, "stop_token_ids": STOPS, "batch_size": 8} | options
    return sample(model, prompts, generator=torch.Generator().manual_seed(seed), **options)


@torch.no_grad()
def rescored(model, prompt, ids, temperature):
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_logprobs_are_those_of_a_fresh_forward(architecture, temperature, prompts):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().eval()
    drawn = run(model, prompts, temperature=temperature, max_new_tokens=20)
    assert drawn.lengths.unique().numel() > 1, "rows should end at different times, so that the batch is compacted"
    for row, prompt in enumerate(prompts):
        ids = drawn.ids(row)
        expected = rescored(model, prompt, ids, temperature)
        assert torch.allclose(drawn.logprobs[row, : len(ids)], expected, atol=1e-4)


def test_tokens_follow_the_tempered_distribution(model):
    prompt, temperature, count = [9, 11, 30], 0.8, 100_000
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1).double() * count
    options = {"max_new_tokens": 1, "temperature": temperature, "batch_size": 20_000}
    found = run(model, [prompt] * count, **options).tokens[:, 0].bincount(minlength=40).double()
    common = expected >= 5
    statistic = ((found - expected) ** 2 / expected)[common].sum().item()
    degrees = int(common.sum()) - 1
    # The 0.999 quantile of chi-squared, by Wilson and Hilferty.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_token_of_probability_0_is_never_drawn():
    logits = torch.full((4, 6), float("-inf"))
    logits[:, 2], logits[:, 4] = 0.0, -1.0
    for uniform in (0.0, 0.3, 0.7310585, 1 - 2**-24):
        ids, logprobs = draw(logits, torch.full((4,), uniform), 1.0, 0, 1.0)
        assert set(ids.tolist()) <= {2, 4}
        assert torch.isfinite(logprobs).all()
    ids, _ = draw(logits, torch.tensor([0.0, 0.73, 0.732, 1 - 2**-24]), 1.0, 0, 1.0)
    assert ids.tolist() == [2, 2, 4, 4]


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(1000, 1)
    uniforms = torch.linspace(0, 0.9999, 1000)
    assert draw(logits, uniforms, 1.0, 2, 1.0)[0].unique().tolist() == [0, 1]
    assert draw(logits, uniforms, 1.0, 0, 0.81)[0].unique().tolist() == [0, 1, 2]
    assert draw(logits, uniforms, 1.0, 0, 0.49)[0].unique().tolist() == [0]
    kept = draw(logits, uniforms, 1.0, 2, 1.0)[0].float()
    assert (kept == 0).float().mean() == pytest.approx(0.5 / 0.8, abs=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_what_generate_gives_each_prompt_alone(architecture, prompts):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]().eval()
    drawn = run(model, prompts, temperature=0)
    for row, prompt in enumerate(prompts):
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": STOPS, "pad_token_id": 0}
        ids = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert drawn.ids(row) == ids


def test_what_a_row_draws_does_not_depend_on_its_batch(model, prompts):
    together = run(model, prompts)
    for batch_size in (1, 3):
        apart = run(model, prompts, batch_size=batch_size)
        assert torch.equal(apart.tokens, together.tokens)
        assert torch.allclose(apart.logprobs, together.logprobs, atol=1e-5)


def test_a_seed_draws_the_same_and_another_seed_not(model, prompts):
    assert torch.equal(run(model, prompts, seed=3).tokens, run(model, prompts, seed=3).tokens)
    assert not torch.equal(run(model, prompts, seed=3).tokens[:, :1], run(model, prompts, seed=4).tokens[:, :1])


def test_lengths_and_reasons_are_those_of_the_stop_tokens(model, prompts):
    drawn = run(model, prompts * 8)
    assert set(drawn.finish_reasons) == {"stop", "length"}
    ended_by = set()
    for row, reason in enumerate(drawn.finish_reasons):
        ids = drawn.ids(row)
        assert not set(ids[:-1]) & set(STOPS)
        assert (ids[-1] in STOPS) == (reason == "stop")
        assert reason == "stop" or len(ids) == 12
        ended_by.add(ids[-1])
        assert (drawn.tokens[row, len(ids) :] == 0).all()
        assert (drawn.logprobs[row, len(ids) :] == 0).all()
    assert set(STOPS) <= ended_by
    assert drawn.tokens.shape[1] == drawn.lengths.max()


def test_a_stop_token_on_the_last_step_counts_as_a_stop(model, prompts):
    first = run(model, prompts, temperature=0, max_new_tokens=1, stop_token_ids=[]).tokens[:, 0].tolist()
    drawn = run(model, prompts, temperature=0, max_new_tokens=1, stop_token_ids=first[:1])
    assert drawn.finish_reasons[0] == "stop"
    assert drawn.lengths[0] == 1


class Letters:
    """A tokenizer whose token i is the letter i."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(chr(96 + i) for i in row) for row in rows.tolist()]


def test_the_token_that_completes_a_stop_string_is_the_last(model, prompts):
    text = "".join(chr(96 + i) for i in run(model, prompts, stop_token_ids=[]).ids(0))
    for start in (0, 1, 4):
        string = text[start : start + 3]
        first = text.find(string) + 3
        drawn = run(model, prompts, stop_token_ids=[], stop_strings=["~~~~~~", string], tokenizer=Letters())
        assert drawn.finish_reasons[0] == "stop"
        assert drawn.lengths[0] == first
        assert "".join(chr(96 + i) for i in drawn.ids(0)) == text[:first]
        for row, prompt in enumerate(prompts):
            expected = rescored(model, prompt, drawn.ids(row), 1.0)
            assert torch.allclose(drawn.logprobs[row, : len(expected)], expected, atol=1e-4)


def test_a_stop_string_must_be_complete_and_ids_still_stop():
    stops = Stops([9], ["bc"], Letters())
    tokens = torch.tensor([[1, 1, 2, 3], [1, 1, 3, 2], [2, 3, 1, 4], [1, 1, 1, 9]])
    assert stops.end(tokens).tolist() == [True, False, False, True]
    assert stops.end(torch.tensor([[3]])).tolist() == [False]
    with pytest.raises(ValueError, match="pass tokenizer"):
        sample(None, [], max_new_tokens=1, stop_token_ids=[], temperature=0, stop_strings=["x"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_models_attention_is_put_back_also_after_an_error(architecture, prompts):
    model = ARCHITECTURES[architecture]().eval()
    before = model.config._attn_implementation
    run(model, prompts)
    assert model.config._attn_implementation == before == "sdpa"
    with pytest.raises(IndexError):  # a third step meets an uniform number that is not there
        _sample_batch(model, prompts, torch.rand(8, 2), Stops([], [], None), 12, (1.0, 0, 1.0))
    assert model.config._attn_implementation == before


def test_without_stop_tokens_every_row_runs_to_the_end(model, prompts):
    drawn = run(model, prompts, stop_token_ids=[])
    assert drawn.lengths.tolist() == [12] * len(prompts)
    assert drawn.finish_reasons == ["length"] * len(prompts)


def test_results_are_ordinary_tensors_and_the_mode_is_kept(model, prompts):
    model.train()
    drawn = run(model, prompts)
    assert model.training
    assert not drawn.tokens.is_inference()
    assert not drawn.logprobs.requires_grad


def test_no_prompts_give_no_completions(model):
    drawn = run(model, [])
    assert drawn.tokens.shape == (0, 0)
    assert drawn.finish_reasons == []


def test_bad_prompts_are_named(model):
    with pytest.raises(BadInput, match="prompt 1 has no tokens"):
        run(model, [[9], []])
    with pytest.raises(BadInput, match=r"prompt 0 has 60 tokens.*12.*64 positions"):
        run(model, [[9] * 60])
    with pytest.raises(ValueError, match=r"needs a torch.Generator"):
        sample(model, [[9]], max_new_tokens=1, stop_token_ids=[])
    with pytest.raises(ValueError, match="temperature -1"):
        run(model, [[9]], temperature=-1)
