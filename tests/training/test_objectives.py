"""What a model is shown and asked for: by hand, by its statistics, the same at every start; and what cannot work."""

import numpy as np
import pytest
import torch

from lmkit.config import validate
from lmkit.errors import BadInput
from lmkit.evaluation.held_out import HeldOut
from lmkit.models.presets import ModelConfig, build_model, transformers_config
from lmkit.tokenization.train import train_tokenizer
from lmkit.training.losses import CausalLMLoss
from lmkit.training.objectives import Objective, check, corrupt_spans, keyed, mask_tokens, num_spans

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(lambda: ["a fox and a hen"] * 9, vocab_size=384, allow_smaller_vocab=True)


def build(tokenizer, **options):
    torch.manual_seed(0)
    return build_model(validate(ModelConfig, {"preset": "nano", "arch": "transformer", **options}), tokenizer)


def blocks(num_rows=6, width=32, seed=1):
    """Rows of 32 places, of which the last ones of some are padding."""
    text = torch.randint(20, 300, (num_rows, width + 1), generator=torch.Generator().manual_seed(seed))
    text[:, 0] = 0
    lengths = torch.arange(num_rows) * 3 + 10
    labels = text[:, 1:].masked_fill(torch.arange(width) >= lengths[:, None], IGNORED)
    return {"input_ids": text[:, :-1], "labels": labels}


class Data:
    """Seven rows, as a mixture of one corpus gives them."""

    num_samples = 7

    def fetch(self, numbers):
        return {name: table[torch.as_tensor(numbers)] for name, table in blocks(7).items()}


def test_15_percent_are_asked_for_of_which_8_in_10_are_hidden():
    tokens = np.full(100_000, 50)
    shown, asked = mask_tokens(tokens, keyed(0, 0), mask_id=4, vocab_size=384)
    chosen = asked != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.004)
    assert (shown[~chosen] == 50).all()
    assert (asked[chosen] == 50).all()
    assert (shown[chosen] == 4).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown[chosen] == 50).mean() == pytest.approx(0.1, abs=0.01)
    short = [mask_tokens(np.array([7, 8]), keyed(0, n), 4, 384)[1] for n in range(50)]
    assert all((row != IGNORED).any() for row in short)


def test_lost_spans_put_back_give_the_text():
    lengths, ends = [], set()
    for position in range(200):
        tokens = np.arange(100, 100 + 1 + position)
        shown, asked = corrupt_spans(tokens, keyed(3, position), range(60))
        parts, current = {}, None
        for token in asked.tolist():
            current = token if token < 60 else current
            parts.setdefault(current, []).extend([token] if token >= 60 else [])
        back = [t for token in shown.tolist() for t in (parts[token] if token < 60 else [token])]
        assert back == tokens.tolist()
        assert list(parts) == list(range(len(parts)))
        ends.add((bool(shown[0] < 60), bool(shown[-1] < 60)))
        if position > 100:
            lengths += [len(part) for part in parts.values()]
            assert len(parts) == num_spans(len(tokens))
            lost = sum(map(len, parts.values()))
            assert lost == round(0.15 * len(tokens))
    assert np.mean(lengths) == pytest.approx(3, abs=0.15)
    assert min(lengths) == 1
    assert max(lengths) > 5
    assert {first for first, _ in ends} == {last for _, last in ends} == {False, True}, "spans are lost anywhere"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("masked", {"block": {"causal": False}}),
        ("prefix", {}),
        ("prefix", {"block": {"num_encoder_layers": 1}}),
        ("span_corruption", {"block": {"num_encoder_layers": 2}}),
        ("next_token", {"arch": "elmo"}),
    ],
)
def test_a_batch_depends_on_seed_and_position_alone_and_trains(tokenizer, name, options):
    model = build(tokenizer, **options)
    make = lambda seed: Objective(name, model.config, tokenizer, 32, seed).reading(Data())  # noqa: E731
    fetch, num_samples = make(5)
    assert num_samples is None
    whole, parts = fetch(np.arange(4)), [fetch(np.arange(2)), fetch(np.arange(2, 4))]
    for key, table in whole.items():
        for row in range(4):
            part = parts[row // 2][key][row % 2]
            width = min(part.numel(), table[row].numel())
            assert torch.equal(table[row].flatten()[:width], part.flatten()[:width])
    if name != "next_token":
        objective, rows = Objective(name, model.config, tokenizer, 32, 5), Data().fetch(np.arange(7))
        drawn = [
            objective.batch(rows, positions, seed)
            for positions, seed in ((range(7), 5), (range(7, 14), 5), (range(7), 6))
        ]
        texts = [str([batch[key].tolist() for key in sorted(batch)]) for batch in drawn]
        assert len(set(texts)) == 3
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(25):
        loss, count = CausalLMLoss(model)(**whole)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss / count).item())
    assert losses[0] == pytest.approx(np.log(384), abs=0.3)
    assert losses[-1] < 0.8 * losses[0]


def test_what_follows_a_prefix_is_asked_for_and_what_is_seen_is_not(tokenizer):
    given = blocks()
    batch = Objective("prefix", build(tokenizer).config, tokenizer, 32, 0).batch(given, range(6))
    for row in range(6):
        length = batch["prefix_lengths"][row]
        assert (batch["labels"][row, : length - 1] == IGNORED).all()
        assert torch.equal(batch["labels"][row, length - 1 :], given["labels"][row, length - 1 :])
        assert (batch["labels"][row] != IGNORED).any()


def test_an_encoder_reads_a_prefix_and_a_decoder_goes_on(tokenizer):
    given = blocks()
    config = build(tokenizer, block={"num_encoder_layers": 1}).config
    batch = Objective("prefix", config, tokenizer, 32, 0).batch(given, range(6))
    for row in range(6):
        read = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        asked = batch["labels"][row][batch["labels"][row] != IGNORED]
        text = given["labels"][row][given["labels"][row] != IGNORED]
        assert torch.equal(torch.cat([read, asked]), torch.cat([given["input_ids"][row, :1], text]))
        assert batch["decoder_input_ids"][row, 0] == 0
        assert torch.equal(batch["decoder_input_ids"][row, 1 : len(asked)], asked[:-1])


def test_elmo_is_asked_for_the_token_before_and_the_token_after(tokenizer):
    given = blocks()
    objective = Objective("next_token", build(tokenizer, arch="elmo").config, tokenizer, 32, 0)
    batch = objective.batch(given, range(6))
    assert torch.equal(batch["labels"][:, :32], given["labels"])
    row = [0, *given["labels"][0][:10].tolist()]
    assert batch["backward_ids"][0, :10].tolist() == row[:0:-1]
    assert batch["labels"][0, 32:42].tolist() == row[-2::-1]
    assert (batch["labels"][0, 42:] == IGNORED).all()
    assert objective.writes


def test_next_tokens_are_read_as_they_are(tokenizer):
    data = Data()
    fetch, num_samples = Objective("next_token", build(tokenizer).config, tokenizer, 32, 0).reading(data)
    assert (fetch, num_samples) == (data.fetch, 7)


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({"arch": "qwen3"}, "masked", "fills a gap without what follows it.*--model.block.causal false"),
        ({"arch": "qwen3"}, "prefix", "arch qwen3 is causal throughout. Use --model.arch transformer"),
        ({"arch": "lstm"}, "prefix", "arch lstm reads token by token"),
        ({"arch": "elmo"}, "prefix", "arch elmo reads token by token"),
        ({"arch": "neural_ngram"}, "prefix", "arch neural_ngram reads token by token"),
        (
            {"arch": "transformer"},
            "span_corruption",
            "a decoder writes them.*num_encoder_layers 4, or objective next_token",
        ),
        ({"arch": "transformer", "block": {"causal": False}}, "next_token", "sees what it is asked.*objective masked"),
        (
            {"arch": "transformer", "block": {"num_encoder_layers": 2}},
            "next_token",
            "nothing to read. Use objective",
        ),
        ({"arch": "transformer", "block": {"num_encoder_layers": 2}}, "masked", "no second text for the decoder"),
    ],
)
def test_an_objective_that_a_model_cannot_learn_is_refused_with_the_nearest_that_works(options, name, said):
    config = validate(ModelConfig, options)
    for model in (config, transformers_config(config, 384)):  # to be made, and there already
        with pytest.raises(BadInput, match=said):
            check(name, model)


def test_documents_are_not_masked_where_a_state_goes_on_or_a_block_is_one_text():
    with pytest.raises(ValueError, match=r"state of arch gru goes from one document to the next.*packing pad"):
        check("next_token", ModelConfig(arch="gru"), document_mask=True)
    encoder = validate(ModelConfig, {"arch": "transformer", "block": {"causal": False}})
    with pytest.raises(ValueError, match=r"objective masked reads a block as one text. Use packing pad"):
        check("masked", encoder, document_mask=True)
    check("prefix", ModelConfig(arch="transformer"), document_mask=True)
    with pytest.raises(BadInput, match="objective masked reads a block as one text"):
        check("masked", transformers_config(encoder, 384), document_mask=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"arch": "transformer", "block": {"num_encoder_layers": 1, "positions": "alibi"}}, "Use relative"),
        ({"arch": "transformer", "block": {"num_encoder_layers": 1, "causal": False}}, "Leave it true"),
        ({"block": {"norm": "layernorm"}}, "block: arch qwen3 has parts of its own. Use --model.arch transformer"),
        ({"arch": "transformer", "block": {"num_key_value_heads": 3}}, "3 does not divide the 4 heads"),
        ({"context_length": 1}, "context_length  Input should be greater than or equal to 2"),
        *(
            ({"arch": arch, "init_std": 0.1}, f"init_std: arch {arch} draws its")
            for arch in ("lstm", "gru", "rnn", "elmo")
        ),
        (
            {"arch": "transformer", "init_std": 0.1, "block": {"norm_placement": "deep"}},
            "init_std: block.norm_placement deep draws its layers by a rule of its own, from their sizes. Leave it out",
        ),
        ({"arch": "lstm", "head_dim": 16}, "head_dim: there are no heads in arch lstm"),
        ({"arch": "lstm", "depth": 4}, "depth: layers grow by rules for Transformers"),
        ({"bptt_tokens": 8}, "arch qwen3 carries no state. Use --model.arch lstm"),
        ({"arch": "lstm", "bptt_tokens": 300}, "bptt_tokens 300: a block has 256 tokens. Use at most as many"),
        ({"arch": "neural_ngram", "window": 300}, "window 300: a block has 256 tokens"),
        (
            {"arch": "transformer", "head_dim": 5, "hidden_size": 15, "block": {"positions": "sinusoidal"}},
            "hidden_size 15: sinusoidal positions go in pairs. Make it even",
        ),
        ({"arch": "transformer", "head_dim": 5, "hidden_size": 20}, "head_dim 5: rotary positions go in pairs"),
    ],
)
def test_settings_that_cannot_work_or_would_do_nothing_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        validate(ModelConfig, options)


def test_too_few_reserved_tokens_are_counted(tokenizer):
    config = build(tokenizer, block={"num_encoder_layers": 1}).config
    with pytest.raises(BadInput, match=r"needs 205 reserved tokens.*has 115 .*Lower model.context_length to 2308"):
        Objective("span_corruption", config, tokenizer, 4096, 0)
    Objective("span_corruption", config, tokenizer, 2308, 0)


@pytest.mark.parametrize(("name", "block"), [("masked", {"causal": False}), ("prefix", {"num_encoder_layers": 1})])
def test_held_out_text_is_scored_by_the_objective_where_no_next_token_is(tokenizer, name, block):
    model = build(tokenizer, block=block).eval()
    text = np.array(tokenizer("a fox and a hen")["input_ids"] * 6 + [0])
    objective = Objective(name, model.config, tokenizer, 16, 0)
    held_out = HeldOut(text, np.array([0, 20, len(text)]), tokenizer, 16, objective)
    scores = held_out.scores(model)
    assert scores["eval/nats_per_token"] == pytest.approx(np.log(384), abs=0.3)
    assert scores == held_out.scores(model)
    assert held_out.unstrided_scores(model) == {}
    assert set(held_out.continuations(model)[0]) == {"prompt", "completion"}
