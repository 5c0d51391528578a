"""Our side of a vLLM server, through TRL's client, with a stand-in for the server: see vllm_standin.py."""

import http.server
import threading

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lmkit.errors import BadInput
from lmkit.generation.vllm import row_seeds
from lmkit.generation.vllm_server import VLLMServer
from tests.generation import vllm_standin
from tests.generation.test_vllm import OPTIONS, PROMPTS, SIZES
from tests.rl.conftest import word_tokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)).eval()
    made.name_or_path = "runs/tiny/sft/model"
    return made


@pytest.fixture
def connect(model):
    """A function that makes a sampler on a stand-in, of the model's architecture with other weights by default."""
    with vllm_standin.installed():
        servers = []

        def make(served=None, tokenizer=None, **settings):
            torch.manual_seed(1)
            served = Qwen3ForCausalLM(model.config) if served is None else served
            servers.append(vllm_standin.Server(served, tokenizer, **settings).__enter__())
            options = {"base_url": servers[-1].address, "group_port": servers[-1].group_port, "timeout": 0}
            sampler = VLLMServer(model, **options)
            return sampler, servers[-1]

        yield make
        for server in servers:
            server.__exit__()


def draw(sampler, model, seed=0, **options):
    return sampler.sample(model, PROMPTS, generator=torch.Generator().manual_seed(seed), **OPTIONS | options)


def expected_logprobs(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / OPTIONS["temperature"]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_draws_with_the_policys_present_weights(model, connect, dtype):
    model.to(dtype)  # as a sharded policy is gathered
    sampler, server = connect()
    first = draw(sampler, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    second = draw(sampler, model)
    as_served = Qwen3ForCausalLM(model.config)
    as_served.load_state_dict(model.state_dict())
    for drawn, now in ((first, False), (second, True)):
        for row, prompt in enumerate(PROMPTS):
            ids = drawn.ids(row)
            expected = expected_logprobs(as_served, prompt, ids)
            assert torch.allclose(drawn.logprobs[row, : len(ids)], expected, atol=1e-4) == now
    assert len(server.requests["/update_weights"]) == 3  # one at the start, so that a wrong model is refused there
    assert len(server.requests["/reset_prefix_cache"]) == 3
    announced = server.requests["/update_weights"][0]["update_info"]
    assert announced["names"] == [name for name, _ in model.named_parameters()]
    assert set(announced["dtype_names"]) == {str(dtype).removeprefix("torch.")}


def test_its_completions_have_the_form_of_the_samplers(model, connect):
    sampler, _ = connect(tokenizer=word_tokenizer())
    drawn, other = draw(sampler, model), draw(sampler, model, seed=1)
    assert drawn.tokens.shape == drawn.logprobs.shape == (3, int(drawn.lengths.max()))
    assert not torch.equal(drawn.tokens[:, :1], other.tokens[:, :1])
    again = draw(sampler, model, batch_size=1)
    assert torch.equal(drawn.tokens, again.tokens)
    assert torch.equal(drawn.logprobs, again.logprobs)
    free = sampler.sample(
        model,
        [[9, 11]] * 20,
        generator=torch.Generator().manual_seed(2),
        tokenizer=word_tokenizer(),
        **OPTIONS | {"stop_strings": ["w1", "w2"], "max_new_tokens": 2},
    )
    assert len({tuple(free.ids(row)) for row in range(20)}) > 4  # a prompt given twice has other completions
    ends = {"token": 0, "string": 0, "length": 0}
    for row, reason in enumerate(free.finish_reasons):
        *before, last = word_tokenizer().convert_ids_to_tokens(free.ids(row))
        by_token, by_string = free.ids(row)[-1] in OPTIONS["stop_token_ids"], last.startswith(("w1", "w2"))
        assert (reason == "stop") == (by_token or by_string)
        assert reason == "stop" or len(before) == 1
        ends["token" if by_token else "string" if by_string else "length"] += 1
    assert min(ends.values()) > 0, ends


def test_the_caller_works_while_the_server_does(model, connect):
    go_on, waited = threading.Event(), []
    sampler, _ = connect(before_completing=lambda: waited.append(go_on.wait(5)))
    finish = sampler.start(model, PROMPTS, generator=torch.Generator().manual_seed(0), **OPTIONS)
    go_on.set()
    assert len(finish().finish_reasons) == 3
    assert waited == [True] * 3


def test_a_row_has_its_seed_in_any_number_of_processes():
    whole = row_seeds(6, 5, torch.Generator().manual_seed(3))
    late = torch.Generator().manual_seed(3)
    torch.rand(4 * 5, generator=late)  # as `Plan.generator` leaves out the rows of other processes
    assert row_seeds(2, 5, late) == whole[4:]
    assert len(set(whole)) == 6


STARTED_BY = (
    r"VLLM_SERVER_DEV_MODE=1 vllm serve runs/tiny/sft/model --weight-transfer-config '\{\"backend\": \"nccl\"\}'"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "0.22.0"}, r"has vLLM 0\.22\.0 and this environment 0\.31\.0.*install the same in both"),
        ({"logprobs_mode": "raw_logprobs"}, "it gives raw_logprobs, and PPO weighs tokens by those of the tempered"),
        ({"dev_mode": False}, "does not expose its development endpoints"),
        ({"weight_transfer_config": None}, "has no weight-transfer engine"),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused(connect, settings, message):
    with pytest.raises(BadInput, match=f"{message}.*{STARTED_BY}"):
        connect(**settings)


def test_a_server_of_another_model_does_not_take_the_weights(connect):
    other = Qwen3ForCausalLM(Qwen3Config(**SIZES | {"intermediate_size": 64}))
    message = r"did not take the policy's weights; does it serve another model\?.*no model\.layers\.0\.mlp\.gate_proj"
    with pytest.raises(BadInput, match=f"{message}.*{STARTED_BY}"):
        connect(other)


def test_what_the_server_answers_to_a_prompt_it_refuses_is_told(model, connect):
    sampler, _ = connect(room=9)
    with pytest.raises(BadInput, match=r"did not complete a prompt: .*the context has 9 tokens"):
        draw(sampler, model)


def test_without_a_gpu_the_weights_have_no_way(model):
    with (
        vllm_standin.installed(on_a_gpu=False),
        vllm_standin.Server(model) as server,
        pytest.raises(BadInput, match="needs a CUDA device, got 'cpu'"),
    ):
        VLLMServer(model, base_url=server.address, timeout=0)


def test_a_server_that_is_not_there_or_is_another_is_waited_for_and_named(model, monkeypatch):
    monkeypatch.setattr("lmkit.generation.vllm_server.WAIT_SECONDS", 0.01)
    said = []
    with vllm_standin.installed():
        port = vllm_standin.free_port()
        with pytest.raises(
            BadInput, match=rf"localhost:{port} was not up after 0\.1 seconds \(.*refused.*{STARTED_BY}"
        ):
            VLLMServer(model, base_url=f"http://localhost:{port}", timeout=0.1, say=said.append)
        assert len(said) == 1
        assert "waiting up to 0.1 seconds" in said[0]
        another = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
        threading.Thread(target=another.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(BadInput, match=r"was not up after 0 seconds \(Unsupported method"):
            VLLMServer(model, base_url=f"http://127.0.0.1:{another.server_port}", timeout=0)
        another.shutdown()
        another.server_close()
        with pytest.raises(BadInput, match="set vllm_server_base_url to where it is"):
            VLLMServer(model, base_url="localhost:8000", timeout=0)
