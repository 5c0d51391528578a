import io
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from lmkit.errors import BadInput
from lmkit.generation import chat as chat_module
from lmkit.generation.chat import COLUMN_WIDTH, Chat, Voice, load_voice, pieces, stream, talk
from lmkit.generation.sampler import sample
from lmkit.tokenization.chat import render, stop_token_ids
from lmkit.tokenization.train import train_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tokenizer():
    text = "Once there was a fox who lived near the river and a squirrel who had a flute. "
    return train_tokenizer(lambda: [text * 3], vocab_size=384, allow_smaller_vocab=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.2, **SIZES)
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture
def voice(model, tokenizer):
    return Voice("ppo", model, tokenizer, continues=False)


def say(chat, line):
    return {name: "".join(answer) for name, answer in chat.ask(line).items()}


# -------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_streaming_draws_what_the_sampler_draws(model, tokenizer, temperature):
    prompt, stops = render(tokenizer, "a fox")[0], stop_token_ids(tokenizer)
    options = {"max_new_tokens": 40, "stop_token_ids": stops, "temperature": temperature}
    for seed in range(4):
        drawn = sample(model, [prompt], generator=torch.Generator().manual_seed(seed), **options)
        want = [i for i in drawn.ids(0) if i not in stops]
        assert list(stream(model, prompt, generator=torch.Generator().manual_seed(seed), **options)) == want


def test_streaming_ends_at_a_stop_token_and_leaves_it_out(model, tokenizer):
    prompt, everything = render(tokenizer, "a fox")[0], list(range(len(tokenizer)))
    options = {"max_new_tokens": 9, "temperature": 1.0, "generator": torch.Generator()}
    assert list(stream(model, prompt, stop_token_ids=everything, **options)) == []


def test_pieces_never_show_half_a_character(tokenizer):
    text = "na\u00efve \u65e5\u672c\u8a9e \U0001f642 and a fox"
    parts = list(pieces(tokenizer, tokenizer(text)["input_ids"]))
    assert "".join(parts) == text
    assert len(parts) > 10, "given as they come, not at the end"
    assert not any("\ufffd" in part for part in parts)


def test_pieces_keep_the_spaces_of_a_tokenizer_that_drops_the_first():
    backend = Tokenizer(models.WordLevel({"\u2581the": 0, "\u2581fox": 1, "es": 2}))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert list(pieces(tokenizer, [0, 1, 2, 1])) == ["the", " fox", "es", " fox"]


def test_pieces_add_up_to_the_decoded_text_for_any_ids(tokenizer):
    for seed in range(20):
        ids = random.Random(seed).choices(range(len(tokenizer)), k=60)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------------- conversation


def test_the_seed_decides_the_answer_and_counts_up(voice):
    chat = Chat([voice], max_new_tokens=12)
    first = say(chat, "a fox")
    chat.forget()
    second = say(Chat([voice], seed=1, max_new_tokens=12), "a fox")
    chat.forget()
    assert first != second
    assert say(chat, "a fox") == second, "the second answer has the next seed"
    chat.forget()
    chat.command("/seed 0")
    assert say(chat, "a fox") == first


def test_temperature_0_gives_one_answer_for_all_seeds(voice):
    chat = Chat([voice], max_new_tokens=8)
    assert chat.command("/temp 0") == "temperature 0.0"
    first = say(chat, "a fox")
    chat.forget()
    assert say(chat, "a fox") == first


def test_turns_build_on_each_other(voice):
    chat = Chat([voice], max_new_tokens=8)
    say(chat, "a fox")
    say(chat, "and then?")
    assert [m["content"] for m in chat.rows[1]["prompt"]] == ["a fox", chat.rows[0]["completion"], "and then?"]
    chat.command("/new")
    say(chat, "a fox")
    assert chat.rows[2]["prompt"] == "a fox"


def test_only_the_oldest_turns_go_when_there_is_no_room(voice, monkeypatch):
    monkeypatch.setattr(chat_module, "stream", lambda *_, **__: iter(voice.tokenizer("the fox")["input_ids"]))
    chat = Chat([voice], max_new_tokens=30)
    for _ in range(8):
        say(chat, "a squirrel")
    turn = [{"role": "user", "content": "a squirrel"}, {"role": "assistant", "content": "the fox"}]
    kept = chat.rows[-1]["prompt"]
    assert kept == [*turn * (len(kept) // 2), turn[0]]
    assert len(render(voice.tokenizer, kept)[0]) + 30 <= 128 < len(render(voice.tokenizer, turn + kept)[0]) + 30


def test_an_answer_takes_the_room_there_is_and_a_text_without_room_is_refused(voice, monkeypatch):
    monkeypatch.setattr(chat_module, "stop_token_ids", lambda _: [])
    drawn = []
    monkeypatch.setattr(chat_module, "pieces", lambda _, ids: drawn.extend(ids) or iter("x"))
    chat = Chat([voice], max_new_tokens=1000)
    say(chat, "a fox")
    assert len(drawn) == 128 - len(render(voice.tokenizer, "a fox")[0])
    with pytest.raises(BadInput, match=r"tokens; wanted 1 to 127"):
        say(chat, "x y " * 100)


def test_a_stopped_answer_is_kept_as_far_as_it_went(voice):
    chat = Chat([voice], max_new_tokens=60)
    answer = chat.ask("a fox")["ppo"]
    start = next(answer)
    answer.close()
    assert chat.rows[0]["completion"] == voice.history[1]["content"]
    assert chat.rows[0]["completion"].startswith(start[:1])


def test_a_base_model_continues_the_text(model, tokenizer):
    chat = Chat([Voice("pretrain", model, tokenizer, continues=True)], max_new_tokens=8)
    ids = tokenizer("Once there was")["input_ids"]
    options = {"max_new_tokens": 8, "stop_token_ids": stop_token_ids(tokenizer), "temperature": 1.0}
    drawn = list(stream(model, ids, generator=torch.Generator().manual_seed(0), **options))
    say(chat, "Once there was")
    say(chat, "Once there was")
    assert chat.rows[0]["completion"] == tokenizer.decode(drawn, skip_special_tokens=True)
    assert chat.rows[1]["prompt"] == "Once there was", "no history"


def test_save_writes_rows_that_load_and_never_overwrites(voice, tmp_path):
    chat = Chat([voice], max_new_tokens=8)
    say(chat, "a fox")
    chat.command(f"/save {tmp_path / 'chat.jsonl'}")
    rows = [json.loads(line) for line in (tmp_path / "chat.jsonl").open(encoding="utf-8")]
    assert rows == chat.rows
    assert list(rows[0]) == ["model", "prompt", "completion", "seed", "temperature"]
    with pytest.raises(BadInput, match="new file"):
        chat.command(f"/save {tmp_path / 'chat.jsonl'}")
    with pytest.raises(BadInput, match="No such file"):
        chat.command(f"/save {tmp_path / 'absent' / 'chat.jsonl'}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/seed x", "wanted a whole number"),
        ("/seed -1", "wanted a whole number"),
        ("/temp", "nothing was given; wanted a number"),
        ("/temp nan", "wanted a number"),
        ("/tmp 1", "/tmp is not a command. Commands: /seed /temp"),
    ],
)
def test_a_wrong_command_says_what_was_wanted(voice, line, message):
    with pytest.raises(BadInput, match=message):
        Chat([voice]).command(line)


# ---------------------------------------------------------------------------------------------------- pipe, terminal


def pipe(monkeypatch, chat, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    talk(chat)


def test_a_pipe_gets_one_line_an_answer(voice, monkeypatch, capsys):
    pipe(monkeypatch, Chat([voice], max_new_tokens=10), "a fox\n\n   \n/seed 7\na squirrel\n/quit\nnever asked\n")
    out, err = capsys.readouterr()
    assert err == "seed 7\n"
    chat = Chat([voice], max_new_tokens=10)
    want = [say(chat, "a fox")["ppo"]]
    chat.forget()
    chat.command("/seed 7")
    want.append(say(chat, "a squirrel")["ppo"])
    assert out.splitlines() == [text.replace("\n", "\\n") for text in want]
    assert "\x1b" not in out


def test_what_a_model_writes_cannot_reach_the_terminal_as_a_control_code(voice, monkeypatch, capsys):
    escape = voice.tokenizer("\x1b[31mred\nline")["input_ids"]
    monkeypatch.setattr(chat_module, "stream", lambda *_, **__: iter(escape))
    pipe(monkeypatch, Chat([voice]), "a fox\n")
    assert capsys.readouterr().out == "\\x1b[31mred\\nline\n"


def test_a_pipe_names_the_voice_when_there_are_several(model, tokenizer, monkeypatch, capsys):
    voices = [Voice(name, model, tokenizer, continues=False) for name in ("sft", "ppo")]
    pipe(monkeypatch, Chat(voices, max_new_tokens=10), "a fox\n")
    (sft, first), (ppo, second) = (line.split("\t", 1) for line in capsys.readouterr().out.splitlines())
    assert (sft, ppo) == ("sft", "ppo")
    assert first == second, "same model, prompt and seed"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def at_terminal(monkeypatch, chat, lines, columns=80):
    """What a terminal of that width shows while `lines` are typed; an exception among them is raised instead."""
    typed, screen = iter(lines), Terminal()

    def read(prompt):
        screen.write(prompt)
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    talk(chat)
    return screen.getvalue()


def test_ctrl_c_stops_the_answer_and_not_the_program(voice, monkeypatch):
    ids = voice.tokenizer("Once there was a fox")["input_ids"]

    def interrupted(*_, **__):
        yield from ids[:2]
        raise KeyboardInterrupt

    chat = Chat([voice], max_new_tokens=10)
    monkeypatch.setattr(chat_module, "stream", interrupted)
    shown = at_terminal(monkeypatch, chat, ["a fox", KeyboardInterrupt(), "/help", "/foo", "", EOFError()])
    assert shown.count("(stopped; /quit leaves)") == 2
    assert "/save FILE" in shown, "it went on"
    assert "/foo is not a command" in shown
    assert len(chat.rows) == 1
    assert chat.rows[0]["completion"] == voice.tokenizer.decode(ids[:2])


def test_answers_stand_side_by_side_where_there_is_room(model, tokenizer, monkeypatch):
    voices = [Voice(name, model, tokenizer, continues=False) for name in ("sft", "ppo")]
    ids = {"x": tokenizer("the left fox")["input_ids"]}
    monkeypatch.setattr(chat_module, "stream", lambda *_, **__: iter(ids["x"]))
    wide = at_terminal(monkeypatch, Chat(voices), ["a fox"], columns=2 * COLUMN_WIDTH)
    line = next(line for line in wide.splitlines() if line.count("the left fox") == 2)
    assert "\x1b" not in line, "what stays on the screen is plain"
    narrow = at_terminal(monkeypatch, Chat(voices), ["a fox"], columns=2 * COLUMN_WIDTH - 1)
    assert "sft: the left fox\nppo: the left fox" in narrow


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    Qwen3ForSequenceClassification(model.config).save_pretrained(folder / "reward")
    return folder


def test_a_model_folder_loads_and_talks(folder):
    base, tuned = load_voice("pretrain", folder / "language"), load_voice("sft", folder / "language")
    assert (base.continues, tuned.continues) == (True, False)
    assert say(Chat([tuned], max_new_tokens=4), "a fox")


def test_a_reward_model_does_not_talk(folder):
    with pytest.raises(BadInput, match="Qwen3ForSequenceClassification, which does not write text"):
        load_voice("reward", folder / "reward")
