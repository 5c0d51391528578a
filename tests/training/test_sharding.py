import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lmkit.errors import BadInput
from lmkit.models.attention import packed_attention
from lmkit.models.presets import ModelConfig, transformers_config
from lmkit.training import loop, sealed, sharding
from lmkit.training.losses import CausalLMLoss
from lmkit.training.sharding import Sharding, asked_sharding

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP2 |= {"FSDP_OFFLOAD_PARAMS": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.fixture
def launcher(monkeypatch):
    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_a_launcher_asks_for_whole_models_shares_or_groups_of_shares(launcher):
    assert asked_sharding(8) is None
    launcher(**FSDP2)
    assert asked_sharding(8) == Sharding(num_replicas=1, reshard_after_forward=True)
    assert asked_sharding(1) is None  # one process has nobody to share with
    launcher(PARALLELISM_CONFIG_DP_REPLICATE_SIZE="2", PARALLELISM_CONFIG_DP_SHARD_SIZE="4")
    launcher(FSDP_RESHARD_AFTER_FORWARD="false")
    assert asked_sharding(8) == Sharding(num_replicas=2, reshard_after_forward=False)
    with pytest.raises(BadInput, match="dp_replicate_size 2 x dp_shard_size 4 is not the number of processes, 6"):
        asked_sharding(6)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "no tp_size"),
    ],
)
def test_other_ways_to_shard_are_refused_by_name(launcher, variables, wanted):
    launcher(**FSDP2 | variables)
    with pytest.raises(BadInput, match=f"it wants {wanted}"):
        asked_sharding(2)


def test_deepspeed_is_for_other_stages_and_named_where_it_is_missing(launcher, monkeypatch):
    launcher(ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(BadInput, match=r"pip install -e .\[deepspeed\]"):
        loop.make_accelerator(False, 64)
    with pytest.raises(BadInput, match=r"DeepSpeed, which serves sft and reward alone.*fsdp2\.yaml"):
        asked_sharding(2)


def test_units_are_the_blocks_that_a_model_names():
    model = CausalLMLoss(AutoModelForCausalLM.from_config(transformers_config(ModelConfig(preset="nano"), 32)))
    assert sharding.blocks(model) == [*model.model.model.layers]
    assert sharding.blocks(nn.Sequential(nn.Linear(2, 2))) == []


def test_a_model_whose_parts_learn_in_turn_is_not_sharded(launcher):
    launcher(**FSDP2)
    module = nn.Linear(2, 2)
    module.leaves_parameters_out = True
    with pytest.raises(BadInput, match=r"parts learn in turn.*ddp\.yaml"):
        sharding.prepare(module, SimpleNamespace(num_processes=2))


def test_an_emptied_module_is_filled_for_a_block_or_for_good():
    source = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    module, inputs = copy.deepcopy(source), torch.ones(1, 3)
    module[0].weight.data.zero_()
    with sharding.whole(module, source):  # it has weights of its own: nothing to do
        assert not module[0].weight.any()
    sharding.empty(module)
    assert sharding.is_empty(module)
    with sharding.whole(module, source):
        assert torch.equal(module(inputs), source(inputs))
        with sharding.whole(module, source):
            pass
        assert not sharding.is_empty(module)
    assert sharding.is_empty(module)
    with sharding.whole(module, source, torch.bfloat16):
        assert module[0].weight.dtype == torch.bfloat16
    sharding.fill(module, source)
    assert torch.equal(module(inputs), source(inputs))
    assert module[0].weight.dtype == torch.float32


def test_what_trl_trains_is_not_sharded_by_fsdp_nor_a_reward_model_by_zero3(launcher):
    class RewardConfig:
        """Never made: the launcher is looked at first."""

    launcher(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    with pytest.raises(BadInput, match=r"centred and judged whole.*zero2\.yaml"):
        sealed.arguments(RewardConfig, {}, None)
    launcher(**FSDP2)
    with pytest.raises(BadInput, match=r"asked for FSDP, which serves pretrain, ppo and vision alone.*ddp\.yaml"):
        sealed.arguments(RewardConfig, {}, None)


@pytest.mark.parametrize("num_hidden_layers", [2, 3])
def test_alike_blocks_are_compiled_once_for_training_alone(monkeypatch, num_hidden_layers):
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    size = ModelConfig(preset="nano", arch="llama", num_hidden_layers=num_hidden_layers)
    module = CausalLMLoss(AutoModelForCausalLM.from_config(transformers_config(size, 512)))
    tokens = torch.randint(0, 512, (2, 13))
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    with packed_attention(module.model):
        prepared = sharding.prepare(module, sharding.plain_accelerator("no"), torch_compile=True)
        loss, _ = prepared(**batch)
        loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        assert len(graphs) == 2  # a block and the loss
        assert any("cross_entropy" in name for name in graphs[1])
        assert not {name for name in graphs[0] if name in ("cos", "sin")}
        module.zero_grad()
        expected, _ = module(**batch)
        expected.backward()
        module(tokens[:, :5], tokens[:, 1:6])
        assert len(graphs) == 2
        for width in range(2, 12):  # batches are as wide as their longest row
            prepared(tokens[:, :width], tokens[:, 1 : width + 1])
    assert len(graphs) == 2 + 2 * 10
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5, msg=name)
