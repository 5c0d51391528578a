"""Our side of the vLLM engine, with a stand-in that has vLLM's interface and samples by the weights it was given."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lmkit.errors import BadInput
from lmkit.generation.sampler import sample
from lmkit.generation.vllm import VLLMSampler

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.3}
OPTIONS = {"max_new_tokens": 8, "stop_token_ids": [2, 7], "temperature": 0.8}
PROMPTS = [[9, 11], [30, 12, 13], [21]]


class SamplingParams(SimpleNamespace):
    """As vLLM's: unknown names are errors."""

    def __init__(self, *, max_tokens, temperature, top_p, top_k, logprobs, stop_token_ids, ignore_eos, stop, seed,
                 detokenize):  # fmt: skip
        assert (top_p, top_k, logprobs, ignore_eos) == (1.0, 0, 0, True)
        assert detokenize == (stop is not None)
        super().__init__(**{k: v for k, v in locals().items() if k not in ("self", "__class__")})


class LLM:
    """Asleep it has neither weights nor cache, and says so when it is used."""

    def __init__(self, *, model, dtype, max_model_len, gpu_memory_utilization, enable_sleep_mode,
                 distributed_executor_backend, logprobs_mode, trust_remote_code):  # fmt: skip
        assert distributed_executor_backend == "external_launcher"
        assert logprobs_mode == "processed_logprobs"
        assert (max_model_len, trust_remote_code) == (64, False)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.awake, self.calls = {"weights", "kv_cache"}, []
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, weights):
        assert "weights" in self.awake
        own = dict(self.model.named_parameters())
        loaded = set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        assert loaded == set(own)
        self.calls.append("load")

    def sleep(self, level):
        assert level == 2
        self.awake = set()
        for parameter in self.model.parameters():
            parameter.data.fill_(float("nan"))

    def wake_up(self, tags):
        self.awake |= set(tags)

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, prompts, params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        assert not use_tqdm
        results = []
        for prompt, param in zip(prompts, params, strict=True):
            options = {"max_new_tokens": param.max_tokens, "stop_token_ids": param.stop_token_ids}
            options |= {"temperature": param.temperature, "generator": torch.Generator().manual_seed(param.seed)}
            drawn = sample(self.model, [prompt["prompt_token_ids"]], **options)
            logprobs = [{i: SimpleNamespace(logprob=p)} for i, p in zip(drawn.ids(0), drawn.logprobs[0].tolist())]
            output = SimpleNamespace(
                token_ids=tuple(drawn.ids(0)), logprobs=logprobs, finish_reason=drawn.finish_reasons[0]
            )
            results.append(SimpleNamespace(outputs=[output]))
        return results


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()


@pytest.fixture
def make(model, monkeypatch):
    """A function that makes a sampler on the stand-in, with the model's tokenizer left out."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__spec__ = LLM, SamplingParams, SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # so that what the sampler sets is taken back
        monkeypatch.delenv(name)
    return lambda **options: VLLMSampler(model, SimpleNamespace(save_pretrained=lambda folder: None), **options)


def draw(sampler, model, seed=0, **options):
    return sampler.sample(model, PROMPTS, generator=torch.Generator().manual_seed(seed), **OPTIONS | options)


@pytest.mark.parametrize("sleep", [True, False])
def test_it_draws_with_the_policys_present_weights(model, make, sleep):
    sampler = make(sleep=sleep)
    first = draw(sampler, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = draw(sampler, model)
    assert sampler.engine.calls == ["load", "reset"] * 2
    assert (sampler.engine.awake == set()) == sleep
    for before, drawn in ((True, first), (False, second)):
        for row, prompt in enumerate(PROMPTS):
            ids = drawn.ids(row)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / OPTIONS["temperature"]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            assert torch.allclose(drawn.logprobs[row, : len(ids)], expected, atol=1e-4) != before


def test_its_completions_have_the_form_of_the_samplers(model, make):
    drawn, other = draw(make(), model), draw(make(), model, seed=1)
    assert drawn.tokens.shape == drawn.logprobs.shape == (3, int(drawn.lengths.max()))
    for row, reason in enumerate(drawn.finish_reasons):
        length = int(drawn.lengths[row])
        assert (drawn.ids(row)[-1] in OPTIONS["stop_token_ids"]) == (reason == "stop")
        assert (drawn.tokens[row, length:] == 0).all()
        assert (drawn.logprobs[row, length:] == 0).all()
    assert not torch.equal(drawn.tokens[:, :1], other.tokens[:, :1])
    assert torch.equal(drawn.tokens, draw(make(), model).tokens)


def test_without_vllm_the_message_says_what_to_do(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"vLLM is not installed.*\.\[vllm\], or leave use_vllm out"):
        VLLMSampler(model, None)


@pytest.mark.gpu
def test_a_real_engine_gives_the_trainers_logprobs(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[vllm]")
    from lmkit.models.presets import ModelConfig, build_model
    from lmkit.tokenization.chat import stop_token_ids
    from lmkit.tokenization.train import train_tokenizer

    tokenizer = train_tokenizer(lambda: ["tell me about a fox"] * 9, vocab_size=384, allow_smaller_vocab=True)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="tiny"), tokenizer).to("cuda").eval()
    stops = stop_token_ids(tokenizer)
    drawn = draw(VLLMSampler(model, tokenizer, dtype="float32"), model, stop_token_ids=stops)
    for row, prompt in enumerate(PROMPTS):
        ids = drawn.ids(row)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids], device="cuda")).logits[0, len(prompt) - 1 : -1]
        expected = (logits / OPTIONS["temperature"]).log_softmax(-1).cpu()
        expected = expected.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert torch.allclose(drawn.logprobs[row, : len(ids)], expected, atol=2e-2)
