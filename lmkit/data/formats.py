"""Rows as people have them to the columns TRL names, recognised by their own columns.

    prompt, completion      demonstrations
    prompt, chosen, rejected    preferences
    prompt                  prompts to sample for

A prompt is a text or a conversation (messages with `role` and `content`), whatever the rows held; a completion is a
text. Recognised are TRL's own forms, OpenAI `messages`, ShareGPT `conversations`, Alpaca, question and answer, and
Anthropic's transcripts ("\\n\\nHuman: ..."). Other columns travel with the row. For columns of other names a mapping
says which is which: {"prompt": "query", "completion": "reply"}.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from lmkit.errors import BadInput

Row = dict[str, Any]
Messages = list[dict[str, str]]
OnBad = Literal["error", "skip"]
# More rows than this share that do not fit point to a wrong reading of the file rather than to a few bad rows.
MAX_LOST = 0.01
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_KNOWN = [
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "instruction",
    "input",
    "output",
    "system",
    "history",
]


def to_prompt_completion(
    rows: Dataset,
    mapping: Mapping[str, str] | None = None,
    source_name: str = "rows",
    on_bad: OnBad = "error",
    where: Callable[[int], str] = "row {}".format,
) -> Dataset:
    """Demonstrations: columns `prompt` and `completion`, the others kept.

    Of a conversation the last assistant turn is the completion, all before it the prompt. Up to 1 % of rows without
    one, or with nothing in it, are left out with a warning, more are BadInput unless `on_bad` is "skip"; none left is
    BadInput always, as are columns that fit no known form. where: number of a row, from 1 -> what to call it.

    >>> rows = Dataset.from_list([{"instruction": "Add.", "input": "2 and 2", "output": "4", "id": 7}])
    >>> to_prompt_completion(rows)[0] == {"prompt": "Add.\\n\\n2 and 2", "completion": "4", "id": 7}
    True
    """
    rows, fate = _renamed(rows, mapping, source_name), (source_name, on_bad, where)
    names = set(rows.column_names)
    if {"prompt", "completion"} <= names:
        return _convert(rows, lambda r: _pair(r["prompt"], r["completion"]), ["prompt", "completion"], *fate)
    if column := _conversation_column(names):
        return _convert(rows, lambda r: _last_turn(_messages(r[column], r)), [column, "system"], *fate)
    if {"instruction", "output"} <= names:
        read = _alpaca_prompt(rows)
        return _convert(rows, lambda r: _pair(read(r), r["output"]), [*_ALPACA, "output"], *fate)
    if {"question", "answer"} <= names:
        return _convert(rows, lambda r: _pair(r["question"], r["answer"]), ["question", "answer"], *fate)
    raise _unknown(rows, ("prompt", "completion"), "demonstrations", source_name)


def to_preferences(
    rows: Dataset,
    mapping: Mapping[str, str] | None = None,
    source_name: str = "rows",
    on_bad: OnBad = "error",
    where: Callable[[int], str] = "row {}".format,
) -> Dataset:
    """Preferences: columns `prompt`, `chosen` and `rejected`, the others kept.

    Whole conversations or transcripts in `chosen` and `rejected` are divided into the turns they share and the answers
    in which they differ. Rows that cannot be divided so are treated as in `to_prompt_completion`.
    """
    rows, fate = _renamed(rows, mapping, source_name), (source_name, on_bad, where)
    names = set(rows.column_names)
    if not {"chosen", "rejected"} <= names:
        raise _unknown(rows, ("prompt", "chosen", "rejected"), "preferences", source_name)
    both = ["chosen", "rejected"]
    if "prompt" in names:
        return _convert(rows, lambda r: _answers(r["prompt"], r), ["prompt", *both], *fate)
    if column := _conversation_column(names):
        consumed = [column, "system", *both]
        return _convert(rows, lambda r: _answers(_messages(r[column], r), r), consumed, *fate)
    if "instruction" in names:
        read = _alpaca_prompt(rows)
        return _convert(rows, lambda r: _answers(read(r), r), [*_ALPACA, *both], *fate)
    if "question" in names:
        return _convert(rows, lambda r: _answers(r["question"], r), ["question", *both], *fate)
    return _convert(rows, lambda r: _answers(None, r), both, *fate)


def to_prompts(
    rows: Dataset,
    mapping: Mapping[str, str] | None = None,
    source_name: str = "rows",
    on_bad: OnBad = "error",
    where: Callable[[int], str] = "row {}".format,
) -> Dataset:
    """Prompts to sample for: a column `prompt`, the others kept; of a conversation, all before its last answer."""
    rows, fate = _renamed(rows, mapping, source_name), (source_name, on_bad, where)
    names = set(rows.column_names)
    if "prompt" in names:
        return _convert(rows, lambda r: {"prompt": _prompt(r["prompt"])}, ["prompt"], *fate)
    if column := _conversation_column(names):
        consumed = [column, "system"]
        return _convert(rows, lambda r: {"prompt": _open_prompt(_messages(r[column], r))}, consumed, *fate)
    if "instruction" in names:
        alpaca = _alpaca_prompt(rows)
        return _convert(rows, lambda r: {"prompt": _prompt(alpaca(r))}, _ALPACA, *fate)
    if "question" in names:
        return _convert(rows, lambda r: {"prompt": _prompt(r["question"])}, ["question"], *fate)
    if {"chosen", "rejected"} <= names:
        consumed = ["chosen", "rejected"]
        return _convert(rows, lambda r: {"prompt": _answers(None, r)["prompt"]}, consumed, *fate)
    raise _unknown(rows, ("prompt",), "prompts", source_name)


def inspect_rows(rows: Dataset, held_out: Dataset | None = None) -> dict[str, int]:
    """Counts to look at before training, of rows in TRL's columns.

    rows, duplicates (rows equal to an earlier one), no_target (a completion, or chosen or rejected, of white space
    only), equal_pairs (chosen is rejected); with `held_out` also held_out_rows, and how many of them share the whole
    row (held_out_in_train) or the prompt (held_out_prompts_in_train) with a row for training.

    >>> rows = Dataset.from_list([{"prompt": "2+2", "completion": "4"}, {"prompt": "2+3", "completion": ""}])
    >>> inspect_rows(rows, rows.select([0]))["held_out_in_train"]
    1
    """
    targets = [name for name in ("completion", "chosen", "rejected") if name in rows.column_names]
    keys = _keys(rows, ["prompt", *targets])
    empty = zip(*([not str(value).strip() for value in rows[name][:]] for name in targets))
    counts = {"rows": len(rows), "duplicates": len(keys) - len(set(keys))}
    if targets:
        counts["no_target"] = sum(map(any, empty))
    if "chosen" in targets:
        counts["equal_pairs"] = sum(a == b for a, b in zip(rows["chosen"][:], rows["rejected"][:]))
    if held_out is not None:
        whole, prompts = set(keys), set(_keys(rows, ["prompt"]))
        counts["held_out_rows"] = len(held_out)
        counts["held_out_in_train"] = sum(key in whole for key in _keys(held_out, ["prompt", *targets]))
        counts["held_out_prompts_in_train"] = sum(key in prompts for key in _keys(held_out, ["prompt"]))
    return counts


def _keys(rows: Dataset, names: list[str]) -> list[str]:
    return [json.dumps([row[name] for name in names]) for row in each_row(rows.select_columns(names))]


# ------------------------------------------------------------------------------------------------------ columns


def _renamed(rows: Dataset, mapping: Mapping[str, str] | None, source: str) -> Dataset:
    """The rows with mapped columns under the names of the forms; a column that stood in their place is dropped."""
    if not mapping:
        return rows
    for wanted, given in mapping.items():
        if wanted not in _KNOWN:
            raise BadInput(
                f"The mapping of {source} names {wanted}; it maps {', '.join(_KNOWN)} to columns of the rows."
            )
        if given not in rows.column_names:
            raise BadInput(
                f"The mapping of {source} takes {wanted} from the column {given}, which is not there. "
                f"Its columns are {', '.join(rows.column_names)}."
            )
    moved = {given: wanted for wanted, given in mapping.items() if wanted != given}
    if len(set(mapping.values())) != len(mapping):
        raise BadInput(f"The mapping of {source} takes two columns from the same one: {dict(mapping)}.")
    replaced = [name for name in moved.values() if name in rows.column_names and name not in moved]
    return rows.remove_columns(replaced).rename_columns(moved)


def _unknown(rows: Dataset, wanted: tuple[str, ...], what: str, source: str) -> BadInput:
    names = rows.column_names
    example = ", ".join(f"{name}: {column}" for name, column in zip(wanted, [*names, *["COLUMN"] * 3]))
    hint = " Rows of `text` alone are for pretraining." if names == ["text"] else ""
    return BadInput(
        f"{source} has the columns {', '.join(names)}, which are no form of {what} known here.{hint} "
        f"Wanted {', '.join(wanted)}. Rename the columns in the file, or, in sft and preferences, say which is which, "
        f"for example  mapping: {{{example}}}"
    )


def _conversation_column(names: set[str]) -> str | None:
    return next((name for name in ("messages", "conversations", "conversation") if name in names), None)


def _convert(
    rows: Dataset,
    read: Callable[[Row], Row],
    consumed: list[str],
    source: str,
    on_bad: OnBad,
    where: Callable[[int], str],
) -> Dataset:
    """The columns that `read` makes of each row beside those not consumed; rows it refuses are left out or BadInput."""
    made: list[Row] = []
    kept: list[int] = []
    refused: list[tuple[int, str]] = []
    for number, row in enumerate(each_row(rows)):
        try:
            made.append(read(row))
            kept.append(number)
        except _Refused as reason:
            refused.append((number + 1, str(reason)))
    if refused:
        shown = [f"{where(number)}  {reason}" for number, reason in refused[:3]]
        if not kept or (on_bad == "error" and len(refused) > MAX_LOST * len(rows)):
            hint = " Mend them in the file; sft and preferences can leave them out: --on_bad skip." if kept else ""
            found = f"{len(refused):,} of {len(rows):,} rows cannot be used"
            raise BadInput(f"{source}: {found}; {'; '.join(shown)}.{hint}")
        warnings.warn(f"{source}: left out {len(refused)} of {len(rows):,} rows; {shown[0]}", stacklevel=3)
    if len({type(row["prompt"]) for row in made}) > 1:  # a column has one type
        for row in made:
            prompt = row["prompt"]
            row["prompt"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rest = rows.select(kept) if refused else rows
    rest = rest.remove_columns([name for name in consumed if name in rows.column_names])
    target = Dataset.from_list(made)
    return concatenate_datasets([target, rest], axis=1) if rest.column_names else target


def each_row(rows: Dataset) -> Iterator[Row]:
    """The rows one by one, read a thousand at a time: several times as fast as iterating over the dataset."""
    for batch in rows.iter(1000):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


# ------------------------------------------------------------------------------------------------------ one row


class _Refused(Exception):
    """Why a row cannot be used."""


_ALPACA = ["instruction", "input", "system", "history"]


def _alpaca_prompt(rows: Dataset) -> Callable[[Row], str | Messages]:
    """The reader of an Alpaca row's prompt: a text, or conversations where the rows have a system text or a history."""
    chat = any(name in rows.column_names and any(rows[name]) for name in ("system", "history"))

    def read(row: Row) -> str | Messages:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise _Refused(f"has {str(parts)[:60]} as instruction and input, which are not texts")
        text = "\n\n".join(parts)
        if not chat:
            return text
        turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for turn in row.get("history") or []:
            if not isinstance(turn, list) or len(turn) != 2:
                raise _Refused(f"has {str(turn)[:60]!r} in its history, which is not a question and its answer")
            turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn)]
        return _messages([*turns, {"role": "user", "content": text}])

    return read


def _messages(turns: Any, row: Row | None = None) -> Messages:
    """A conversation as messages of `role` and `content`, from those or from ShareGPT's `from` and `value`."""
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        raise _Refused(f"has {str(turns)[:60]!r} where a conversation was wanted")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise _Refused(f"has the turn {str(turn)[:60]!r}; wanted role and content")
        name, content = (turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or "")
        if not isinstance(name, str) or name not in ROLES or not isinstance(content, str):
            raise _Refused(
                f"has a turn of {name!r} with {type(content).__name__}; known are {', '.join(ROLES)}, as text"
            )
        messages.append({"role": ROLES[name], "content": content})
    if row and row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _transcript(text: str) -> Messages:
    """The turns of a text such as "\\n\\nHuman: Hi\\n\\nAssistant: Hello"; a name inside a paragraph opens no turn."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise _Refused(f"starts with {text[:40]!r} where a transcript starts with '\\n\\nHuman:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": words.strip()} for name, words in zip(parts[1::2], parts[2::2])]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _prompt(value: Any, answered: bool = False) -> str | Messages:
    """A prompt that asks for an answer: a text, or a conversation that ends with the user's turn."""
    if isinstance(value, str) and not _is_transcript(value):
        if not value.strip():
            raise _Refused("has an empty prompt")
        return value
    return _open_prompt(_transcript(value) if isinstance(value, str) else _messages(value), answered)


def _open_prompt(messages: Messages, answered: bool = False) -> Messages:
    """The turns before a last one of the assistant; where `answered`, by text elsewhere, that one must be empty."""
    if messages and messages[-1]["role"] == "assistant":
        if answered and (words := messages[-1]["content"]).strip():
            raise _Refused(
                f"has a prompt that ends with the assistant's turn {words[:60]!r} beside its answer; wanted "
                "a prompt that ends with the user's turn. Move that turn into the completion (or chosen and rejected)"
            )
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise _Refused("has no user turn to answer")
    return messages


def _text(value: Any) -> str:
    """An answer as text, from a text or a single assistant turn."""
    if isinstance(value, str):
        return value
    if value is None:
        raise _Refused("has no answer")
    messages = _messages(value)
    if [message["role"] for message in messages] != ["assistant"]:
        raise _Refused(f"has the turns {', '.join(m['role'] for m in messages)} where one answer was wanted")
    return messages[0]["content"]


def _pair(prompt: Any, completion: Any) -> Row:
    return {"prompt": _prompt(prompt, answered=True), "completion": _target(_text(completion))}


def _target(completion: str) -> str:
    if not completion.strip():
        raise _Refused("has an empty completion")
    return completion


def _last_turn(messages: Messages) -> Row:
    if messages[-1]["role"] != "assistant":
        raise _Refused("ends without an assistant turn")
    return {"prompt": _open_prompt(messages), "completion": _target(messages[-1]["content"])}


def _answers(prompt: Any, row: Row) -> Row:
    """Prompt, chosen and rejected; answers that are whole conversations carry the prompt themselves."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (_is_whole(chosen) and _is_whole(rejected)):
        if prompt is None:
            raise _Refused("has no prompt, and its chosen and rejected are not whole conversations")
        return {"prompt": _prompt(prompt, answered=True), "chosen": _text(chosen), "rejected": _text(rejected)}
    chosen, rejected = (_transcript(v) if isinstance(v, str) else _messages(v) for v in (chosen, rejected))
    if chosen[:-1] != rejected[:-1]:
        raise _Refused("has a chosen and a rejected conversation that differ before their last turn")
    prompt = _open_prompt(chosen[:-1], answered=True)
    return {"prompt": prompt, "chosen": _text(chosen[-1:]), "rejected": _text(rejected[-1:])}


def _is_whole(value: Any) -> bool:
    return _is_transcript(value) or (isinstance(value, list) and len(value) > 1)
