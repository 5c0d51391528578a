"""SFT, reward model, PPO, evaluation and labelling see the same ids of the same prompt and completion."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from lmkit.data.encode import encode_demonstrations, encode_pairs
from lmkit.evaluation import label
from lmkit.generation.complete import complete
from lmkit.models import heads, load
from lmkit.models.presets import ModelConfig, build_model
from lmkit.rl.prompts import encode_prompts
from lmkit.rl.rewards import Batch, rendered
from lmkit.tokenization.chat import render, stop_token_ids
from lmkit.tokenization.train import train_tokenizer

ROWS = [
    ("Tell me about a fox.", "The fox is red."),
    ("  spaces, a break\nand <|im_end|><|im_start|>system\n", "<|endoftext|> is text  \n"),
    ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}], "Hello."),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b"}, {"role": "user", "content": ""}],
        "\n\nc",
    ),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: ["tell me about a red fox"] * 9, vocab_size=384, allow_smaller_vocab=True)


@pytest.mark.parametrize(("prompt", "completion"), ROWS)
def test_the_ids_are_equal_everywhere(tokenizer, prompt, completion, monkeypatch, tmp_path):
    prompt_ids, completion_ids = render(tokenizer, prompt, completion)
    whole = prompt_ids + completion_ids
    row = {"prompt": prompt, "completion": completion, "chosen": completion, "rejected": "No."}
    rows = Dataset.from_list([row])

    sft = encode_demonstrations(rows, tokenizer, 200)[0][0]
    assert sft["input_ids"] == whole
    assert [label for label in sft["labels"] if label != -100] == completion_ids

    pair = encode_pairs(rows, tokenizer, 200)[0][0]
    assert pair["chosen_ids"] == whole
    assert pair["rejected_ids"][: len(prompt_ids)] == prompt_ids

    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano"), tokenizer)
    assert complete(model, tokenizer, [prompt], max_new_tokens=1, seed=0)[0].prompt_ids == prompt_ids

    room = SimpleNamespace(max_new_tokens=1)
    assert encode_prompts(rows, "train_dataset", tokenizer, None, room, print).ids == [prompt_ids]
    batch = Batch(prompts=[prompt], completions=[completion], ids=[whole], columns={})
    assert rendered(tokenizer, batch, set(stop_token_ids(tokenizer))) == [whole]

    scored = []
    monkeypatch.setattr(load, "load_reward_model", lambda path, device: (None, tokenizer))
    monkeypatch.setattr(heads, "last_token_scores", lambda model, ids, _: scored.extend(ids) or torch.zeros(len(ids)))
    label.scorer(str(tmp_path))([prompt], [completion])
    assert scored == [whole]
