from dataclasses import replace

import pytest
import torch

from lmkit.generation.sampler import Completions
from lmkit.rl.rollout import by_length, collect, completion_ids, unscored, values_after

PROMPTS = [[11, 12, 13], [21], [31, 32]]
# Token 3 is the pad id, 2 a stop token; row 1 has both inside and at its end.
COMPLETIONS = [[14, 2], [3, 22, 3, 3], [33]]


@pytest.fixture
def rollout():
    lengths = torch.tensor([len(c) for c in COMPLETIONS])
    tokens = torch.tensor([c + [0] * (4 - len(c)) for c in COMPLETIONS])
    logprobs = -torch.arange(12.0).view(3, 4) * (torch.arange(4) < lengths[:, None])
    return unscored(PROMPTS, Completions(tokens, lengths, logprobs, ["stop", "stop", "length"]))


def test_masks_come_from_lengths_also_where_ids_equal_pad(rollout):
    assert rollout.mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert rollout.stopped.tolist() == [True, True, False]
    assert completion_ids(rollout) == COMPLETIONS


def test_models_read_prompt_and_completion_joined_without_a_gap(rollout):
    input_ids, before, targets = rollout.model_inputs()
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS)):
        joined = prompt + completion
        length = min(len(joined), input_ids.shape[1])
        assert input_ids[row, :length].tolist() == joined[:length]
        assert before[row].nonzero().flatten().tolist() == list(range(len(prompt) - 1, len(joined) - 1))
    assert targets.tolist() == [token for completion in COMPLETIONS for token in completion]


def test_rows_are_cut_to_their_longest_and_keep_their_numbers(rollout):
    part = rollout.rows(torch.tensor([2, 0]))
    assert completion_ids(part) == [COMPLETIONS[2], COMPLETIONS[0]]
    assert part.completion_ids.shape == (2, 2)
    assert part.finish_reasons == ["length", "stop"]
    assert torch.equal(part.sampled_logprobs, rollout.sampled_logprobs[[2, 0], :2])
    assert part.prompt_lengths.tolist() == [2, 3]


def test_counted_numbers_go_back_to_their_places(rollout):
    table = rollout.per_token(torch.arange(1.0, 8.0))
    assert table.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 0, 0, 0]]


def test_groups_have_rows_of_like_length_and_every_row_once(rollout):
    groups = by_length(rollout, 2)
    assert [group.tolist() for group in groups] == [[0, 1], [2]]


@pytest.mark.parametrize("reasons", [["stop"] * 3, ["stop", "stop", "length"], ["length"] * 3])
def test_the_value_after_is_asked_for_where_a_completion_was_cut_off(rollout, reasons):
    def forward(input_ids, before, targets):
        return None, torch.arange(1.0, len(targets) + 1)

    found = values_after(replace(rollout, finish_reasons=reasons), forward, batch_size=1)
    after = [len(completion) + 1.0 for completion in COMPLETIONS]  # one value more than the row has tokens
    assert found.tolist() == [value * (reason == "length") for value, reason in zip(after, reasons)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_collection_puts_each_number_where_it_belongs(rollout, batch_size):
    drawn = Completions(
        rollout.completion_ids, rollout.completion_lengths, rollout.sampled_logprobs, rollout.finish_reasons
    )
    found, seconds = collect(
        PROMPTS,
        lambda prompts: drawn,
        lambda ids, before, targets: (-targets.float(), targets * 2.0, targets * 3.0),
        lambda ids, before, targets: (-targets - 1.0,),
        lambda completions: lambda: torch.tensor([float(sum(c)) for c in completions]),
        batch_size,
    )
    counted = found.completion_ids * found.mask
    assert torch.equal(found.logprobs, -counted.float())
    assert torch.equal(found.values, counted * 2.0)
    assert torch.equal(found.entropies, counted * 3.0)
    assert torch.equal(found.ref_logprobs, (-counted - 1.0) * found.mask)
    assert found.scores.tolist() == [16, 31, 33]
    assert seconds.keys() == {"rollout", "reward", "score"}


def test_the_reward_starts_before_the_models_and_is_waited_for_after_them(rollout):
    drawn = Completions(
        rollout.completion_ids, rollout.completion_lengths, rollout.sampled_logprobs, rollout.finish_reasons
    )
    order = []

    def note(what, value):
        order.append(what)
        return value

    collect(
        PROMPTS,
        lambda prompts: note("draw", drawn),
        lambda ids, before, targets: note("policy", (targets.float(),) * 3),
        lambda ids, before, targets: note("reference", (targets.float(),)),
        lambda completions: note("start", lambda: note("scores", torch.zeros(3))),
        3,
    )
    assert order == ["draw", "start", "policy", "reference", "scores"]
