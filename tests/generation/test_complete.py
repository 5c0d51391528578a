"""Prompts to texts: what the model drew, without its stop token, the same however the work is divided."""

from types import SimpleNamespace

import pytest
import torch

from lmkit.generation import complete as module
from lmkit.generation.complete import complete, complete_shared
from lmkit.models.presets import ModelConfig, build_model
from lmkit.tokenization.chat import render, stop_token_ids
from lmkit.tokenization.train import train_tokenizer

PROMPTS = [f"Tell me about fox {i}." for i in range(10)]
ALONE = SimpleNamespace(process_index=0, num_processes=1)


@pytest.fixture(scope="module")
def models():
    tokenizer = train_tokenizer(lambda: ["tell me about a fox"] * 9, vocab_size=384, allow_smaller_vocab=True)
    torch.manual_seed(0)
    model = build_model(ModelConfig(preset="nano"), tokenizer)
    with torch.no_grad():  # makes the stop token likely enough to be drawn in some rows and not in others
        model.get_output_embeddings().weight[stop_token_ids(tokenizer)[0]] *= 3
    return model, tokenizer


def share(models, state, progress=lambda done, tokens: None, **options):
    options |= {"chunk_size": 3, "max_new_tokens": 24}
    return complete_shared(*models, PROMPTS, seed=1, state=state, progress=progress, **options)


def test_texts_are_the_ids_without_the_stop_token(models):
    model, tokenizer = models
    rows = complete(model, tokenizer, PROMPTS, max_new_tokens=24, seed=0)
    stop = stop_token_ids(tokenizer)
    assert 0 < sum(row.finished for row in rows) < len(rows)
    for prompt, row in zip(PROMPTS, rows):
        assert row.prompt_ids == render(tokenizer, prompt)[0]
        assert (row.ids[-1] in stop) == row.finished
        assert len(row.ids) == 24 or row.finished
        assert "<|im_end|>" not in row.text
        assert row.text == tokenizer.decode([i for i in row.ids if i not in stop], skip_special_tokens=True)


def test_a_stop_string_ends_a_completion_with_its_token_and_not_its_text(models):
    model, tokenizer = models
    free = complete(model, tokenizer, PROMPTS, max_new_tokens=24, seed=0)
    letters = free[0].text[3:6]
    rows = complete(model, tokenizer, PROMPTS, max_new_tokens=24, seed=0, stop_strings=[letters, "never written"])
    assert rows[0].finished
    assert rows[0].text == free[0].text[: free[0].text.find(letters)]
    for before, row in zip(free, rows):
        assert before.ids[: len(row.ids)] == row.ids
        assert letters not in row.text
        assert letters not in tokenizer.decode(row.ids[:-1], skip_special_tokens=True)
        assert row.finished == (letters in before.text or before.finished)


def test_progress_counts_prompts_and_tokens(models):
    seen = []
    rows = share(models, ALONE, lambda done, tokens: seen.append((done, tokens)))
    assert [done for done, _ in seen] == [3, 6, 9, 10]
    assert sum(tokens for _, tokens in seen) == sum(len(row.ids) for row in rows)


def test_two_processes_draw_what_one_does(models, monkeypatch):
    parts = []
    for process in range(2):
        monkeypatch.setattr(module, "gather_object", lambda mine: parts.extend(mine) or parts)
        state = SimpleNamespace(process_index=process, num_processes=2)
        if process == 0:
            with pytest.raises(KeyError):  # the other process's chunks are not there yet
                share(models, state)
    assert share(models, state) == share(models, ALONE)


def test_another_seed_draws_others(models):
    model, tokenizer = models
    first, second = (complete(model, tokenizer, PROMPTS, max_new_tokens=24, seed=seed) for seed in (0, 1))
    assert [row.ids for row in first] != [row.ids for row in second]


def test_chunks_that_are_kept_are_not_sampled_again(models, tmp_path, monkeypatch):
    def stop(done, tokens):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share(models, ALONE, stop, keep=tmp_path / "kept")
    seen, whole = [], share(models, ALONE)
    assert share(models, ALONE, lambda done, tokens: seen.append(done), keep=tmp_path / "kept") == whole
    assert seen == [9, 10]
    monkeypatch.setattr(module, "complete", lambda *_, **__: pytest.fail("sampled again"))
    assert share(models, ALONE, keep=tmp_path / "kept") == whole
