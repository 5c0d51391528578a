"""Judging scores on pairs: every number by hand, and the sentence a person reads."""

import numpy as np
import pytest
from datasets import Dataset

from lmkit.evaluation.reward_model import judge, judge_ensemble, most_wrong, summary

# Four pairs, of which the second was dropped when encoding; the label of the last contradicts the labeler's scores.
ROWS = Dataset.from_dict(
    {
        "prompt": ["a", "b", "c", "d"],
        "chosen": ["1", "2", "3", "4"],
        "rejected": ["5", "6", "7", "8"],
        "score_chosen": [2.0, 9.0, 1.0, 0.0],
        "score_rejected": [1.0, 8.0, 0.0, 3.0],
    }
)
PAIRS = Dataset.from_dict(
    {"chosen_ids": [[1] * 4, [1] * 9, [1] * 5], "rejected_ids": [[1] * 4, [1] * 2, [1] * 6], "row": [0, 2, 3]}
)
SCORES = np.array([[3.0, 0.0, -2.0], [1.0, 1.0, 2.0]])


def test_the_numbers_are_those_counted_by_hand():
    metrics, bins = judge(SCORES, PAIRS, ROWS)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_like_length"] == pytest.approx(1 / 2)  # the pairs of 4 and 4, and of 5 and 6 tokens
    assert metrics["ceiling"] == pytest.approx(2 / 3)  # the labeler's scores contradict the last label alone
    assert metrics["accuracy_noiseless"] == pytest.approx(2 / 3)  # the model agrees with them there too
    assert metrics["score_mean"] == pytest.approx(5 / 6)
    assert metrics["num_heldout"] == sum(b["count"] for b in bins) == 3
    lengths, scores = [4, 9, 5, 4, 2, 6], [3, 0, -2, 1, 1, 2]
    assert metrics["length_correlation"] == pytest.approx(np.corrcoef(lengths, scores)[0, 1])


def test_pairs_without_the_labelers_scores_have_no_ceiling():
    metrics, _ = judge(SCORES, PAIRS, ROWS.remove_columns(["score_chosen", "score_rejected"]))
    assert not {"ceiling", "accuracy_noiseless"} & metrics.keys()


def test_an_ensemble_is_judged_by_the_mean_of_its_scores():
    other = np.array([[0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
    metrics = judge_ensemble([SCORES, other])
    assert metrics["member_agreement"] == pytest.approx(1 / 3)
    assert metrics["accuracy_members_mean"] == pytest.approx(2 / 3)  # margins 0.5, 0.5 and -2.5
    assert judge_ensemble([SCORES]) == {}


def test_the_worst_pairs_come_first_with_their_own_texts():
    worst = most_wrong(SCORES, PAIRS, ROWS)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in worst] == [("d", "4", "8"), ("c", "3", "7")]
    assert worst[0]["score"] == {"chosen": -2.0, "rejected": 2.0}
    assert len(most_wrong(SCORES, PAIRS, ROWS, num=1)) == 1


MEASURED = {"accuracy_high": 0.7, "calibration_error": 0.1, "length_correlation": 0.2}


@pytest.mark.parametrize(
    ("measured", "warned"),
    [
        ({"accuracy": 0.628, "accuracy_low": 0.58, "ceiling": 0.726}, None),
        ({"accuracy": 0.60, "accuracy_low": 0.55, "ceiling": 0.726}, "accuracy 0.600 is not half of the way"),
        ({"accuracy": 0.628, "accuracy_low": 0.58, "ceiling": 0.95}, "to the 0.950 that the labels allow: expect"),
        ({"accuracy": 0.60, "accuracy_low": 0.40}, "that accuracy may be chance, 0.5 lies in its interval: expect"),
        ({"accuracy": 0.60, "accuracy_low": 0.55}, None),
    ],
)
def test_a_warning_is_relative_to_what_the_labels_allow(measured, warned):
    first, *rest = summary(MEASURED | measured).split("\n")
    assert f"held-out accuracy {measured['accuracy']:.3f} [{measured['accuracy_low']:.3f}, 0.700]" in first
    assert ("ceiling" in first) == ("ceiling" in measured)
    assert len(rest) == (warned is not None)
    assert warned is None or (rest[0].startswith("warning: ") and warned in rest[0])
