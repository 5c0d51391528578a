import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmkit.config import StageConfig, validate
from lmkit.errors import BadInput, Interrupted, Stopped
from lmkit.stage import Stage, latest_checkpoint, verify
from lmkit.training import checkpoint, loop
from lmkit.training.ema import EMA
from lmkit.training.options import TrainConfig

BASE = TrainConfig(max_steps=10, per_device_train_batch_size=8, warmup_steps=2, learning_rate=0.02, logging_steps=3)


class Toy(nn.Module):
    """Classifies tokens from the mean of a window; `dropout` makes it use torch's generator."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16, 32)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).cumsum(1)
        logits = self.head(self.dropout(self.hidden(x).relu()))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return loss, (labels != -100).sum()


def fetch(numbers):
    """Rows with different numbers of counted tokens, so that a mean of means would be another loss."""
    rows = torch.stack([torch.randint(0, 32, (9,), generator=torch.Generator().manual_seed(int(n))) for n in numbers])
    labels = rows[:, 1:].clone()
    for label, number in zip(labels, numbers):
        label[: number % 8] = -100
    return {"input_ids": rows[:, :-1], "labels": labels}


class OneStage(Stage):
    """A stage of the toy, which a test can ask to stop after some updates."""

    def __init__(self, directory, stop_after=None):
        super().__init__("toy", StageConfig(output_dir=directory))
        self.stop_after, self.asked = stop_after, 0

    def stop_requested(self):
        self.asked += 1
        return self.asked == self.stop_after


def train(directory, stop_after=None, module=None, evaluate=None, num_samples=50, **changes):
    module = module or Toy()
    options = {name: changes.pop(name) for name in ("ema", "flops_per_token", "enough") if name in changes}
    with OneStage(directory, stop_after) as stage:
        module.metrics = loop.fit(
            module,
            changes.pop("fetch", fetch),
            num_samples,
            BASE.model_copy(update=changes),
            accelerator=Accelerator(cpu=True),
            stage=stage,
            evaluate=evaluate,
            **options,
        )
    return module


def same(a, b, tolerance=0.0):
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in pairs)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_eight_micro_batches_are_one_batch(tmp_path, optim, monkeypatch):
    # Newton-Schulz in bfloat16 turns a difference of one rounding into one of 2^-9 of the update; here in float32.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    whole = train(tmp_path / "a", optim=optim)
    split = train(tmp_path / "b", optim=optim, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert same(whole, split, 1e-6)
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("stop_after", [1, 4, 9])
@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_stopping_anywhere_and_going_on_gives_the_same_bits(tmp_path, optim, stop_after):
    whole = train(tmp_path / "whole", module=Toy(dropout=0.3), optim=optim)
    with pytest.raises(Interrupted, match=f"after step {stop_after} of 10"):
        train(tmp_path / "parts", stop_after, module=Toy(dropout=0.3), optim=optim)
    parts = train(tmp_path / "parts", module=Toy(dropout=0.3), optim=optim)
    assert same(whole, parts)
    tensors = [checkpoint.load(latest_checkpoint(tmp_path / n / "checkpoints"))[0] for n in ("whole", "parts")]
    for group, named in tensors[0].items():
        assert named.keys() == tensors[1][group].keys()
        assert all(torch.equal(value, tensors[1][group][name]) for name, value in named.items()), group
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows(tmp_path / n)]
        for n in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == [3, 6, 9, 10]


def test_any_number_of_workers_reads_the_same_data_also_after_a_stop(tmp_path):
    whole = train(tmp_path / "whole", dataloader_num_workers=0)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop_after=5, dataloader_num_workers=3)
    assert same(whole, train(tmp_path / "parts", dataloader_num_workers=1))


def test_positions_themselves_are_given_where_there_is_no_number_of_samples(tmp_path):
    seen = []
    train(tmp_path, fetch=lambda n: seen.append(n) or fetch(n), num_samples=None, max_steps=3)
    assert np.concatenate(seen).tolist() == list(range(24))


def test_averaged_weights_go_on_exactly_and_are_evaluated(tmp_path):
    whole, parts = EMA(0.9), EMA(0.9)
    seen = []

    def evaluate():
        seen.append(module.head.weight.detach().clone())
        return {"eval/score": len(seen)}

    module = Toy()
    train(tmp_path / "whole", module=module, ema=whole, evaluate=evaluate)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop_after=4, ema=EMA(0.9))
    again = train(tmp_path / "parts", ema=parts)
    assert same(module, again)
    assert all(torch.equal(a, b) for a, b in zip(whole.average, parts.average))
    last = rows(tmp_path / "whole")[-1]
    assert (last["eval/score"], last["eval/ema_score"]) == (1, 2)
    with whole.applied():
        assert torch.equal(module.head.weight, seen[1])
    assert torch.equal(module.head.weight, seen[0])


def test_a_global_batch_is_split_by_what_fits_and_its_size_is_kept(tmp_path):
    whole = train(tmp_path / "a", optim="adamw_torch_fused")
    config = {"optim": "adamw_torch_fused", "global_batch_size": 8, "per_device_train_batch_size": 2}
    assert same(whole, train(tmp_path / "b", **config), 1e-6)
    with pytest.raises(BadInput, match=r"global_batch_size 8 is no multiple of per_device_train_batch_size 3 x 1"):
        train(tmp_path / "c", **config | {"per_device_train_batch_size": 3})
    with pytest.raises(BadInput, match="give one of the two"):
        validate(TrainConfig, {"global_batch_size": 8, "gradient_accumulation_steps": 2})


def test_going_on_with_another_batch_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, stop_after=4)
    with pytest.raises(BadInput, match=r"step-000004 was made with 8 samples an update; .* now make 16"):
        train(tmp_path, gradient_accumulation_steps=2)


def test_utilisation_is_shown_where_the_peak_is_known(tmp_path, monkeypatch):
    train(tmp_path / "cpu", flops_per_token=1e6)
    assert "mfu" not in rows(tmp_path / "cpu")[0]
    monkeypatch.setattr(loop, "peak_flops", lambda device: 1e12)
    train(tmp_path / "known", flops_per_token=1e6)
    for row in rows(tmp_path / "known"):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e6 / 1e12, rel=0.05)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from the device, which waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_a_step_reads_one_number_from_the_device(tmp_path, optim):
    counts = []
    for steps in (4, 9):
        with Reads() as reads:
            train(tmp_path / str(steps), optim=optim, max_steps=steps, logging_steps=100, gradient_accumulation_steps=2)
        counts.append(reads.count)
    # The one is whether all is finite; on a GPU it is asked with the next row of the log.
    assert counts[1] - counts[0] == 5


def test_recomputed_activations_give_the_same_bits_and_keep_less(tmp_path):
    from transformers import AutoModelForCausalLM

    from lmkit.models.presets import ModelConfig, transformers_config
    from lmkit.training.losses import CausalLMLoss

    kept = {}

    def language_model(recompute):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers_config(ModelConfig(preset="nano"), 32))
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            train(tmp_path / str(recompute), module=CausalLMLoss(model), gradient_checkpointing=recompute, max_steps=3)
        kept[recompute] = sum(held)
        return model

    assert same(language_model(False), language_model(True))
    assert kept[True] < 0.7 * kept[False]
    with pytest.raises(BadInput, match="no blocks that can be recomputed"):
        train(tmp_path / "toy", gradient_checkpointing=True)


@pytest.mark.parametrize("ends_early", [False, True])
def test_a_run_that_was_killed_after_its_last_update_takes_none_and_has_the_metrics(tmp_path, ends_early):
    options = {"evaluate": lambda: {"eval/score": 0.1}, "eval_steps": 4, "enough": lambda: ends_early}
    whole, again = (train(tmp_path, **options) for _ in range(2))
    assert rows(tmp_path)[-1]["step"] == (4 if ends_early else 10)
    assert same(whole, again)
    assert again.metrics == whole.metrics
    assert again.metrics.keys() >= {"loss", "grad_norm", "learning_rate", "eval/score"}


def test_checkpoints_come_every_save_steps_and_two_are_kept(tmp_path):
    train(tmp_path, save_steps=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000008", "step-000010"]


class Poisoned(Toy):
    """From its sixth forward on the loss, or only its gradient, is not a number."""

    def __init__(self, loss_too):
        super().__init__()
        self.calls, self.loss_too, self.good = 0, loss_too, None

    def forward(self, input_ids, labels):
        loss, count = super().forward(input_ids, labels)
        self.calls += 1
        if self.calls == 6:
            self.good = {k: v.clone() for k, v in self.state_dict().items()}
            poison = (self.head.weight.sum() - self.head.weight.sum().detach()) * float("nan")
            loss = loss + (poison if self.loss_too else (self.head.weight[0, 0] * 0).sqrt())
        return loss, count


@pytest.mark.parametrize("loss_too", [True, False])
def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path, loss_too):
    module = Poisoned(loss_too)
    with pytest.raises(Stopped, match=r"step 6: the loss is .* not finite \(head.weight") as error:
        train(tmp_path, module=module, save_steps=2)
    assert ("loss is nan" in str(error.value)) == loss_too
    assert all(torch.equal(value, module.good[name]) for name, value in module.state_dict().items())
    last = latest_checkpoint(tmp_path / "checkpoints")
    assert last.name == "step-000004"
    verify(last)
    assert [row["step"] for row in rows(tmp_path)] == [3]


def test_evaluation_runs_in_eval_mode_every_eval_steps_and_at_the_end(tmp_path):
    module, modes = Toy(dropout=0.5), []
    train(
        tmp_path,
        module=module,
        evaluate=lambda: modes.append(module.training) or {"eval/score": len(modes)},
        eval_steps=4,
    )
    assert modes == [False] * 3
    assert [(row["step"], row["eval/score"]) for row in rows(tmp_path) if "eval/score" in row] == [
        (4, 1),
        (8, 2),
        (10, 3),
    ]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [3, 6, 9, 10]


def test_the_gradient_is_that_of_the_mean_over_all_counted_tokens(tmp_path):
    seen = []
    train(
        tmp_path, fetch=lambda n: seen.append(n) or fetch(n), max_steps=1, warmup_steps=0, gradient_accumulation_steps=2
    )
    module = Toy()
    sums = [module(**fetch(numbers)) for numbers in seen]
    (sum(loss for loss, _ in sums) / sum(count for _, count in sums)).backward()
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters()])
    assert rows(tmp_path)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_tokens_and_losses_of_a_row_are_those_since_the_last_row(tmp_path):
    seen = []
    train(tmp_path, fetch=lambda n: seen.append(n) or fetch(n), max_steps=4, logging_steps=2, learning_rate=1e-12)
    module = Toy()
    for row, batches in zip(rows(tmp_path), (seen[:2], seen[2:])):
        sums = [module(**fetch(numbers)) for numbers in batches]
        assert row["loss"] == pytest.approx(sum(s.item() for s, _ in sums) / sum(c.item() for _, c in sums), rel=1e-6)


@pytest.mark.parametrize("capable", [True, False])
def test_bf16_is_chosen_by_instructions_and_width(monkeypatch, capable):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    assert loop.mixed_precision(None, 1024) == ("bf16" if capable else "no")
    assert loop.mixed_precision(None, 64) == "no"
    assert loop.mixed_precision(True, 64) == "bf16"
    assert loop.mixed_precision(False, 1024) == "no"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="--multi_gpu --num_processes 2"):
        loop.make_accelerator(False, 64)
