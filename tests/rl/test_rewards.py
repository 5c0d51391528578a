import asyncio
import contextlib
import copy
import http.server
import json
import math
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers import models

from lmkit.errors import BadInput
from lmkit.models.heads import last_token_scores
from lmkit.rl import scorers
from lmkit.rl.rewards import RunningNorm, make_reward
from lmkit.rl.scorers import Batch
from lmkit.tokenization.chat import CHAT_TEMPLATE, render


@pytest.fixture
def batch():
    ids = [[21, 22, 2], [23, 24, 25, 3], [26, 3, 3]]
    return Batch(["w1", "w3", "w6"], ["w2", "w4 w5", ""], ids, {"answer": [4, 5, 6], "source": ["a", "b", "c"]})


def make(reward, tokenizer):
    return make_reward(reward, tokenizer, batch_size=2)


def test_model_directory_and_function_give_the_same_scores(batch, reward_model, tokenizer, tmp_path):
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = last_token_scores(reward_model, batch.ids)

    def function(prompts, completions, answer, source):
        return expected.tolist()

    for reward in (reward_model, tmp_path, str(tmp_path), function):
        assert torch.allclose(make(reward, tokenizer)(batch), expected, atol=1e-6)


def test_a_model_scores_the_last_token_also_where_it_equals_pad(batch, reward_model, tokenizer):
    """Ids 3 are the pad: the stock forward would score the token before them."""
    scores = make(reward_model, tokenizer)(batch)
    shorter = make(reward_model, tokenizer)(Batch([""] * 3, [""] * 3, [ids[:-1] for ids in batch.ids], {}))
    assert (scores - shorter).abs().min() > 1e-4


def test_a_function_is_given_prompts_completions_and_every_column(batch, tokenizer):
    seen = {}
    make(lambda **given: seen.update(given) or [0, 1, 2], tokenizer)(batch)
    assert seen == {"prompts": batch.prompts, "completions": batch.completions, **batch.columns}


@pytest.mark.parametrize("scores", [[1, 2.5, True], torch.tensor([1.0, 2.5, 1.0]), (1, 2.5, 1.0)])
def test_any_sequence_of_numbers_will_do(batch, tokenizer, scores):
    found = make(lambda **_: scores, tokenizer)(batch)
    assert found.tolist() == [1.0, 2.5, 1.0]
    assert found.dtype == torch.float32


def too_short(prompts, completions, **columns):
    return [1.0, 2.0]


def not_a_number(prompts, completions, **columns):
    return [1.0, math.nan, 2.0]


def a_text(prompts, completions, **columns):
    return [1.0, 2.0, "3"]


def nothing(prompts, completions, **columns):
    return [None, 1.0, 2.0]


def one_text(prompts, completions, **columns):
    return "abc"


def one_number(prompts, completions, **columns):
    return 1.0


def raises(prompts, completions, **columns):
    raise KeyError("answr")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_short, "too_short returned 2 values for 3 completions; wanted one each"),
        (not_a_number, "not_a_number returned nan for row 1; wanted a finite number.*'w4 w5'"),
        (a_text, "a_text returned '3' for row 2"),
        (nothing, "nothing returned None for row 0"),
        (one_text, "one_text returned 'abc' for 3 completions"),
        (one_number, "one_number returned 1.0 for 3 completions"),
        (raises, "raises raised KeyError: 'answr'"),
    ],
)
def test_what_a_function_does_wrong_is_named_with_its_row(batch, tokenizer, function, message):
    with pytest.raises(BadInput, match=message):
        make(function, tokenizer)(batch)


def test_a_function_by_name(batch, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_a_test.py").write_text(
        "def ones(prompts, completions, **_): return [1.0] * len(prompts)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    assert make("my_rewards_for_a_test:ones", tokenizer)(batch).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(BadInput, match=r"'my_rewards_for_a_test:twos' cannot be imported.*twos"):
        make("my_rewards_for_a_test:twos", tokenizer)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("runs/nowhere/model", "'runs/nowhere/model' is not a directory; wanted a reward model's directory or 'module"),
        ("no_such_module:f", "'no_such_module:f' cannot be imported: No module named"),
        (3, "reward is 3; wanted a reward model, its directory"),
    ],
)
def test_what_is_no_reward_is_refused(tokenizer, reward, message):
    with pytest.raises(BadInput, match=message):
        make(reward, tokenizer)


# ------------------------------------------------------------------------------------------------- another tokenizer


@pytest.fixture
def other(reward_model, tokenizer, tmp_path):
    """The directory of a reward model whose tokenizer has the words in another order, and that tokenizer."""
    own = copy.deepcopy(tokenizer)
    vocabulary = {word: i for word, i in tokenizer.get_vocab().items()}
    for i in range(10):
        vocabulary[f"w{i}"], vocabulary[f"w{i + 10}"] = vocabulary[f"w{i + 10}"], vocabulary[f"w{i}"]
    own._tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    reward_model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    return tmp_path, own


@pytest.mark.parametrize("conversation", [False, True])
def test_a_reward_model_with_another_tokenizer_scores_the_text(tokenizer, reward_model, other, conversation):
    path, own = other
    prompts, texts = ["w1", "w3 w12", "w6"], ["w2", "w4 w5", "w7 w8"]
    if conversation:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    ids = [[i for part in render(tokenizer, *pair) for i in part] for pair in zip(prompts, texts)]
    ids[2] = ids[2][:-1]  # cut off: no stop token
    expected = [[i for part in render(own, *pair) for i in part] for pair in zip(prompts, texts)]
    expected[2] = expected[2][:-1]
    assert expected[0] != ids[0]
    found = make(path, tokenizer)(Batch(prompts, texts, ids, {}))
    assert torch.allclose(found, last_token_scores(reward_model, expected), atol=1e-6)


# A template of other words between the turns, with the same stop tokens; and none.
@pytest.mark.parametrize("template", [CHAT_TEMPLATE.replace("'<|im_start|>' +", "'<|im_start|> w9 ' +"), None])
def test_a_reward_model_with_another_template_scores_the_text(tokenizer, reward_model, tmp_path, template):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    reward_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = template
    prompts, texts = ["w1", "w3 w12"], ["w2", "w4 w5"]
    ids, expected = (
        [[i for part in render(t, *pair) for i in part] for pair in zip(prompts, texts)] for t in (plain, tokenizer)
    )
    assert ids != expected
    found = make(tmp_path, plain)(Batch(prompts, texts, ids, {}))
    assert torch.allclose(found, last_token_scores(reward_model, expected), atol=1e-6)


def test_a_model_that_cannot_read_the_policys_ids_is_refused(reward_model, tokenizer):
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    with pytest.raises(BadInput, match=r"64 token embeddings.*\d+ tokens.*Give its directory instead"):
        make(reward_model, tokenizer)


def test_a_sequence_longer_than_the_reward_models_context_is_named(batch, reward_model, tokenizer):
    long = Batch(["w1", "w2"], ["w3", "w4"], [[21, 22], [21] * 129], {})
    with pytest.raises(BadInput, match=r"row 1 has 129 tokens.*reward_model has 128 positions"):
        make(reward_model, tokenizer)(long)


# ------------------------------------------------------------------------------------------------------ several rewards


def ones(prompts, completions, **columns):
    return [1.0] * len(prompts)


def lengths(prompts, completions, **columns):
    return [len(completion) for completion in completions]


async def patient(prompts, completions, **columns):
    await asyncio.sleep(0.01)
    return [2.0, 4.0, 8.0]


def test_rewards_are_weighed_in_the_order_given(batch, reward_model, tokenizer):
    model = last_token_scores(reward_model, batch.ids)
    given = [lengths, reward_model, patient]
    reward = make_reward(given, tokenizer, batch_size=2, weights=[1.0, 10.0, 0.5])
    expected = torch.tensor([2.0, 5.0, 0.0]) + 10 * model + torch.tensor([1.0, 2.0, 4.0])
    assert torch.allclose(reward(batch), expected, atol=1e-5)
    assert reward.parts["lengths"].tolist() == [2.0, 5.0, 0.0]
    assert set(reward.parts) == {"reward_model", "lengths", "patient"}


def test_the_same_reward_twice_counts_twice(batch, tokenizer):
    assert make([ones, ones], tokenizer)(batch).tolist() == [2.0, 2.0, 2.0]


def test_an_ensemble_of_one_is_its_member_and_of_three_is_by_hand(batch, reward_model, tokenizer):
    alone = last_token_scores(reward_model, batch.ids)
    for aggregation in ("sum", "mean", "min", "mean_minus_variance"):
        found = make_reward([reward_model], tokenizer, batch_size=2, aggregation=aggregation)(batch)
        assert torch.allclose(found, alone, atol=1e-6)
    three = [lambda **_: [1.0, 2.0, 3.0], lambda **_: [3.0, 2.0, 0.0], lambda **_: [5.0, 2.0, 0.0]]
    for aggregation, expected in (
        ("mean", [3.0, 2.0, 1.0]),
        ("min", [1.0, 2.0, 0.0]),
        ("mean_minus_variance", [3.0 - 0.5 * 8 / 3, 2.0, 1.0 - 0.5 * 2]),
    ):
        options = {"aggregation": aggregation, "variance_coef": 0.5, "batch_size": 2}
        assert make_reward(three, tokenizer, **options)(batch).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([], {}, "0 rewards with no reward_weights"),
        ([ones, ones], {"weights": [1.0]}, "2 rewards with 1 reward_weights.*a weight for each"),
        ([ones], {"weights": [1.0], "aggregation": "min"}, "1 rewards with 1 reward_weights, taken by min"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tokenizer, rewards, options, message):
    with pytest.raises(BadInput, match=message):
        make_reward(rewards, tokenizer, batch_size=2, **options)


# ---------------------------------------------------------------------------------------------------- beside the models


def test_functions_work_while_the_caller_goes_on_and_errors_surface_at_the_end(batch, tokenizer):
    """Two functions that wait for each other and for the caller: only threads of their own let them end."""
    met = threading.Barrier(3, timeout=10)

    def waits(prompts, completions, **columns):
        met.wait()
        return [1.0, 2.0, 3.0]

    async def also_waits(prompts, completions, **columns):
        met.wait()
        return [1.0, 1.0, 1.0]

    finish = make([waits, also_waits], tokenizer).start(batch)
    met.wait()
    assert finish().tolist() == [2.0, 3.0, 4.0]
    finish = make([ones, raises], tokenizer).start(batch)
    with pytest.raises(BadInput, match="raises raised KeyError"):
        finish()


# ---------------------------------------------------------------------------------------------------------- normalising


def test_scores_are_normalised_by_all_seen_so_far_then_clipped():
    batches = [torch.tensor([1e6 + 1.0, 1e6 + 3.0]), torch.tensor([1e6 + 5.0, 1e6 - 7.0, 1e6 + 2.0])]
    norm = RunningNorm(True, clip=1.2)
    norm(batches[0])
    found = norm(batches[1])
    seen = torch.cat(batches).double()
    assert norm.mean == pytest.approx(seen.mean().item(), rel=1e-12)
    assert norm.std == pytest.approx(seen.std(correction=0).item(), rel=1e-9)
    expected = ((batches[1].double() - seen.mean()) / seen.std(correction=0)).clamp(-1.2, 1.2)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert found[1] == pytest.approx(-1.2)


def test_clipping_alone_keeps_no_statistics_and_neither_changes_nothing():
    scores = torch.tensor([-3.0, 0.5, 9.0])
    assert RunningNorm(False, clip=2.0)(scores).tolist() == [-2.0, 0.5, 2.0]
    assert RunningNorm(False)(scores) is scores
    assert RunningNorm(True)(torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]


def test_statistics_go_on_after_a_checkpoint_to_the_bit():
    draws = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    whole, first = RunningNorm(True), RunningNorm(True)
    expected = [whole(row) for row in draws]
    for row in draws[:3]:
        first(row)
    second = RunningNorm(True)
    second.load(json.loads(json.dumps(first.state())))
    for row, wanted in zip(draws[3:], expected[3:]):
        assert torch.equal(second(row), wanted)
    assert second.state() == whole.state()


# -------------------------------------------------------------------------------------------------------------- servers


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `answers` holds (status, body, seconds to wait) for each request, `seen` what came."""
    monkeypatch.setattr(scorers, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body, wait = answers[min(len(seen), len(answers)) - 1]
            time.sleep(wait)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    answers, seen = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{listening.server_port}/score", answers=answers, seen=seen)
        listening.shutdown()


def ask(server, tokenizer, batch):
    return make_reward(server.url, tokenizer, batch_size=2, timeout_seconds=0.2, max_retries=2)(batch)


def test_a_server_is_given_prompts_completions_and_columns(server, tokenizer, batch):
    for body in ('{"scores": [1, 2.5, -3]}', "[1, 2.5, -3]"):
        server.answers[:] = [(200, body, 0)]
        assert ask(server, tokenizer, batch).tolist() == [1.0, 2.5, -3.0]
    assert server.seen[-1] == {"prompts": batch.prompts, "completions": batch.completions, **batch.columns}


@pytest.mark.parametrize("first", [(500, "", 0), (429, "", 0), (200, "[1, 2, 3]", 0.5)], ids=["500", "429", "slow"])
def test_a_server_that_fails_once_is_asked_again(server, tokenizer, batch, first):
    server.answers[:] = [first, (200, "[1, 2, 3]", 0)]
    assert ask(server, tokenizer, batch).tolist() == [1.0, 2.0, 3.0]
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("answer", "times", "message"),
    [
        ((503, "", 0), 3, r"did not score the batch in 3 attempts: it answered 503"),
        ((200, "[1, 2, 3]", 0.5), 3, r"in 3 attempts: .*timed out"),
        ((404, "", 0), 1, r"in 1 attempts: it answered 404 Not Found"),
        ((200, "not JSON", 0), 1, r"gave no JSON"),
        ((200, "[1, 2]", 0), 1, r"the reward server http.* returned 2 values for 3 completions"),
        ((200, "[1, NaN, 3]", 0), 1, r"returned nan for row 1.*'w4 w5'"),
        ((200, '{"score": [1, 2, 3]}', 0), 1, r"returned None for 3 completions"),
        ((200, '[1, "2", 3]', 0), 1, r"returned '2' for row 1"),
    ],
)
def test_what_a_server_does_wrong_is_said(server, tokenizer, batch, answer, times, message):
    server.answers[:] = [answer]
    with pytest.raises(BadInput, match=message):
        ask(server, tokenizer, batch)
    assert len(server.seen) == times


def test_a_server_that_is_not_there_and_a_column_that_is_no_json(server, tokenizer, batch):
    with pytest.raises(BadInput, match=r"127.0.0.1:9/ did not score the batch in 2 attempts: .*refused.* Is it up"):
        make_reward("http://127.0.0.1:9/", tokenizer, batch_size=2, max_retries=1)(batch)
    odd = Batch(batch.prompts, batch.completions, batch.ids, {"when": [object()] * 3})
    with pytest.raises(BadInput, match=r"cannot be sent to http.* as JSON"):
        ask(server, tokenizer, odd)
