"""A chain's first artifacts at the smallest size: tokenizer, shards and a language model, untrained."""

import gzip
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes name the embedded data relative to the repository's root."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """A folder with tokenizer/shards and pretrain/model, and a few demonstrations and prompts of tales."""
    import torch

    from lmkit.data.shards import write_shards
    from lmkit.models.presets import ModelConfig, build_model
    from lmkit.tokenization.train import train_tokenizer

    folder = tmp_path_factory.mktemp("nano")
    documents = gzip.decompress((ROOT / "data/tales/text.validation.txt.gz").read_bytes()).decode().split("\n\n")
    tokenizer = train_tokenizer(lambda: documents, vocab_size=512, trainer="tokenizers")
    for split in ("train", "validation"):
        write_shards(documents[:20], tokenizer, folder / "shards" / split, 1)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano", context_length=256), tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("sft", 40), ("prompts.train", 12), ("prompts.heldout", 6)):
        with gzip.open(ROOT / f"data/tales/{name}.jsonl.gz", "rt") as file:
            (folder / f"{name}.jsonl").write_text("".join(line for _, line in zip(range(count), file)))
    return folder


@pytest.fixture(scope="session")
def reward_model(nano, tmp_path_factory):
    """The directory of a reward model whose scores are drawn."""
    import torch

    from lmkit.models.load import load_reward_model

    folder = tmp_path_factory.mktemp("reward") / "model"
    model, tokenizer = load_reward_model(nano / "model")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(nano):
    """A file of given pairs."""
    rows = [json.loads(line) for line in (nano / "sft.jsonl").read_text().splitlines()]
    path = nano / "pairs.jsonl"
    with path.open("w") as file:
        for row in rows:
            rejected = " ".join(reversed(row["completion"].split()))
            file.write(json.dumps({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}) + "\n")
    return path


@pytest.fixture(scope="session")
def label_folders(tmp_path_factory):
    """A function that draws the kinds it is given, bar, dot or ring in noise, into label folders of train and test."""
    import numpy as np
    from PIL import Image

    shapes = {kind: np.zeros((8, 8)) for kind in ("bar", "dot", "ring")}
    shapes["bar"][:, 3:5] = 200
    shapes["dot"][3:5, 3:5] = 200
    shapes["ring"][1:7, 1:7] = 200
    shapes["ring"][2:6, 2:6] = 0

    def draw(*kinds):
        folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
        for split, count in (("train", 24), ("test", 8)):
            for kind in kinds:
                (folder / split / kind).mkdir(parents=True)
                for number in range(count):
                    picture = np.clip(shapes[kind] + generator.normal(0, 20, (8, 8)), 0, 255).astype(np.uint8)
                    Image.fromarray(picture).save(folder / split / kind / f"{number}.png")
        return folder

    return draw
