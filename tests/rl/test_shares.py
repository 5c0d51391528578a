import pytest
import torch
from accelerate import Accelerator

from lmkit.generation.sampler import Completions
from lmkit.rl import shares as module
from lmkit.rl.config import PPOConfig
from lmkit.rl.plan import Plan
from lmkit.rl.rollout import unscored
from lmkit.rl.shares import gathered, micro_batches, shares


def test_shares_have_like_totals_and_sizes():
    # By hand: 10 and 9 first, 8 to the 9, 7 to the 10, then 2 to one 17 and 1 to the other.
    assert shares([2, 7, 9, 10, 8, 1], 2) == [[3, 1, 0], [2, 4, 5]]
    lengths = torch.randint(10, 1000, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = shares(lengths, 8)
    assert sorted(item for group in groups for item in group) == list(range(64))
    assert {len(group) for group in groups} == {8}
    totals = [sum(lengths[item] for item in group) for group in groups]
    in_order = [sum(lengths[i : i + 8]) for i in range(0, 64, 8)]
    assert max(totals) / (sum(lengths) / 8) < 1.05 < max(in_order) / (sum(lengths) / 8)


def test_fewer_items_than_groups_leave_some_empty():
    assert shares([5, 6], 4) == [[1], [0], [], []]
    assert shares([], 2) == [[], []]


@pytest.mark.parametrize(
    ("num_rows", "num_processes", "size"), [(12, 1, 5), (12, 2, 4), (7, 2, 1), (3, 4, 2), (9, 4, 2)]
)
def test_each_row_counts_once_and_processes_go_through_as_many_groups(num_rows, num_processes, size):
    lengths = torch.randint(1, 50, (num_rows,), generator=torch.Generator().manual_seed(1))
    parts = [micro_batches(lengths, size, process, num_processes) for process in range(num_processes)]
    assert len({len(part) for part in parts}) == 1
    counted = [row for part in parts for rows, counts in part if counts for row in rows.tolist()]
    assert sorted(counted) == list(range(num_rows))
    assert all(0 < len(rows) <= size for part in parts for rows, _ in part)


def rollout(prompts, tokens, lengths):
    logprobs = torch.arange(tokens.numel()).view(tokens.shape).float()
    reasons = ["stop" if length < 3 else "length" for length in lengths]
    return unscored(prompts, Completions(tokens, torch.tensor(lengths), logprobs, reasons))


def test_rollouts_of_different_widths_are_one(monkeypatch):
    first = rollout([[1, 2, 3], [4]], torch.tensor([[7, 8], [9, 0]]), [2, 1])
    second = rollout([[5, 6]], torch.tensor([[1, 2, 3, 4]]), [4])
    assert gathered(first, Accelerator(cpu=True)) is first
    monkeypatch.setattr(module, "gather_object", lambda given: [*given, second])
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    both = gathered(first, Accelerator(cpu=True))
    assert both.prompt_ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert both.completion_ids.tolist() == [[7, 8, 0, 0], [9, 0, 0, 0], [1, 2, 3, 4]]
    assert both.sampled_logprobs[0].tolist() == [0, 1, 0, 0]
    assert (both.completion_lengths.tolist(), both.finish_reasons) == ([2, 1, 4], ["stop", "stop", "length"])


def test_completions_of_all_processes_are_one_table_and_each_finds_its_own(monkeypatch):
    first = Completions(torch.tensor([[7, 8], [9, 0]]), torch.tensor([2, 1]), torch.ones(2, 2), ["stop", "length"])
    second = Completions(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.zeros(1, 3), ["stop"])
    monkeypatch.setattr(module, "gather_object", lambda given: [*given, second])
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    both = gathered(first, Accelerator(cpu=True))
    assert both.tokens.tolist() == [[7, 8, 0], [9, 0, 0], [1, 2, 3]]
    for part, wanted in ((range(2), first), (range(2, 3), second)):
        own = both.rows(part)
        assert torch.equal(own.tokens, wanted.tokens)
        assert torch.equal(own.lengths, wanted.lengths)
        assert torch.equal(own.logprobs, wanted.logprobs)
        assert own.finish_reasons == wanted.finish_reasons


@pytest.mark.parametrize("num_rows", [1, 5, 8])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_processes_take_all_rows_and_the_draws_of_one_process(num_rows, num_processes):
    config = PPOConfig(rollout_batch_size=8, num_generations=2)
    plans = [Plan(config, 3, process, num_processes) for process in range(num_processes)]
    parts = [plan.part(num_rows) for plan in plans]
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert all(len(part) for part in parts[:num_rows])
    whole = torch.rand(num_rows, 6, generator=plans[0].generator("sampling", 2))
    for plan, part in zip(plans, parts):
        own = torch.rand(len(part), 6, generator=plan.generator("sampling", 2, skip=part.start * 6))
        assert torch.equal(own, whole[part.start : part.stop])
    assert all(plan.rows(1, 5) == plans[0].rows(1, 5) for plan in plans)
