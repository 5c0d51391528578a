"""Finding, naming and ranking: measures by hand, and what a source of captions must have."""

import json

import pytest
import torch
from PIL import Image

from lmkit.errors import BadInput
from lmkit.vision.match import captioned_splits, class_embeddings, recall_at, retrieval

DIAGONAL = torch.eye(3).bool()


def test_recall_counts_rows_whose_own_is_among_the_first_k():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    assert [recall_at(similarity, DIAGONAL, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_tie_counts_against():
    """A model that gives all images one embedding finds nothing, in whatever order the columns stand."""
    assert recall_at(torch.zeros(3, 3), DIAGONAL, 2) == 0


def test_one_of_several_relevant_ones_is_enough():
    similarity, relevant = torch.tensor([[0.1, 0.8, 0.9]]), torch.tensor([[True, True, False]])
    assert [recall_at(similarity, relevant, k) for k in (1, 2)] == [0, 1]


def test_retrieval_goes_both_ways():
    """Images 0 and 1 share text 0, but image 1 lies at text 1; so text 0 finds image 0, and text 1 image 1 first."""
    texts = torch.eye(2)
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
    found = retrieval(images, texts, torch.tensor([0, 0, 1]))
    assert found["image_to_text/recall_at_1"] == pytest.approx(2 / 3)
    assert found["text_to_image/recall_at_1"] == 0.5
    assert found["text_to_image/recall_at_5"] == found["image_to_text/recall_at_10"] == 1


@pytest.mark.parametrize(("templates", "named"), [(["a photo of a {}", "a thing"], "'a thing'"), ([], "'none'")])
def test_a_template_has_a_place_for_the_name(templates, named):
    with pytest.raises(BadInput, match=rf"templates: {named} has no place \{{\}}"):
        class_embeddings(None, None, ["cat"], templates)


def write(folder, rows):
    for row in rows:
        (folder / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_captions_are_given_or_made_of_labels(tmp_path):
    write(tmp_path, [{"file_name": f"{i}.png", "label": "cat", "text": "my cat" if i else None} for i in range(10)])
    with pytest.raises(BadInput, match=r"1 of 10 images of train have no caption, the first is .*0\.png. Give"):
        captioned_splits(tmp_path, None, 0.2, 0)
    splits = captioned_splits(tmp_path, "a photo of a {}", 0.2, 0)
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 8, "test": 2}
    captions = sorted(example.caption for examples in splits.values() for example in examples)
    assert captions == ["a photo of a cat", *["my cat"] * 9]
    with pytest.raises(BadInput, match=r"caption: 'a photo' has no place \{\}"):
        captioned_splits(tmp_path, "a photo", 0.2, 0)
    with pytest.raises(BadInput, match="1% of 10 images leave none to test on"):
        captioned_splits(tmp_path, "a {}", 0.01, 0)


def test_a_source_with_a_validation_split_is_tested_on_it(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split, [{"file_name": f"{split}.png", "text": "a grey square"}])
    assert [e.name for e in captioned_splits(tmp_path, None, 0.5, 0)["test"]] == [str(tmp_path / "val" / "val.png")]
