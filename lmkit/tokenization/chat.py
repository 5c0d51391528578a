"""Where text becomes token ids: special tokens, the chat template, prompts and completions.

Every stage that turns a conversation into ids (SFT, reward model, PPO, evaluation, chat) goes through `render`, so that
all of them see the same ids, and so that text from a user, a corpus or a model can never become a special token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmkit.errors import BadInput
from lmkit.tokenization.vocabulary import END_OF_TURN, SPECIAL_TOKENS, START_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_TEMPLATE", "ROLES", "SPECIAL_TOKENS", "encode_text", "render", "render_all", "stop_token_ids"]

ROLES = ("system", "user", "assistant")
CHUNK = 1000  # rows whose texts are encoded together

# ChatML. The line break stands before a turn, not after it, so that a conversation ends with <|im_end|>: its ids are
# exactly those of the prompt followed by those of the completion.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str | list[str]) -> list[int] | list[list[int]]:
    """Ids of a text, or of each of several, as plain text: a special token's name is spelled out, never the token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a completion: first the one that closes an assistant's turn, then the end of a document.

    The first is the special token that the chat template writes after an assistant's words; without a template it is
    the tokenizer's `eos_token`. Raises BadInput when there is neither.
    """
    ids = []
    if tokenizer.chat_template == CHAT_TEMPLATE:
        ids.append(tokenizer.convert_tokens_to_ids(END_OF_TURN))
    elif tokenizer.chat_template:
        question = [{"role": "user", "content": "a"}]
        asked = _apply(tokenizer, question, add_generation_prompt=True)
        answered = _apply(tokenizer, [*question, {"role": "assistant", "content": "b"}])
        words = answered[len(asked) :] if answered[: len(asked)] == asked else answered
        ids += [i for i in words if i in tokenizer.all_special_ids][-1:]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise BadInput(
            f"The tokenizer {tokenizer.name_or_path} has neither an eos_token nor a chat template that closes a turn "
            "with a special token, so nothing can end a completion. Set its eos_token and save it again."
        )
    return list(dict.fromkeys(ids))


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], completion: str | list[dict] | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, as a model sees it before it answers, and of a completion.

    Args:
        prompt: a text (one user turn) or a conversation, messages with `role` (system, user, assistant) and `content`.
        completion: a text, or a conversation of one assistant message; None for a prompt alone.

    Returns:
        prompt_ids: with a chat template, the turns and the header of the assistant's answer; without one, the text.
        completion_ids: the answer's ids and one stop token, nothing after it; empty when `completion` is None.

    A tokenizer without a chat template takes a text or a single user message. Raises BadInput on anything else.
    """
    return next(render_all(tokenizer, [prompt], [completion]))


def render_all(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]], completions: Sequence[Any]
) -> Iterator[tuple[list[int], list[int]]]:
    """`render` of each prompt and completion, in order, several times as fast: one call of the tokenizer a chunk.

    The texts are encoded apart from each other, so a row's ids do not depend on the others.
    """
    if tokenizer.chat_template and tokenizer.chat_template != CHAT_TEMPLATE:
        for prompt, completion in zip(prompts, completions, strict=True):
            yield _render_foreign(tokenizer, _messages(prompt), None if completion is None else _answer(completion))
        return
    write = _chat_parts(tokenizer) if tokenizer.chat_template else _plain_parts(tokenizer)
    rows = zip(prompts, completions, strict=True)
    while chunk := list(itertools.islice(rows, CHUNK)):
        parts = [write(_messages(prompt), None if c is None else _answer(c)) for prompt, c in chunk]
        texts = list({part: None for row in parts for half in row for part in half if isinstance(part, str)})
        ids = dict(zip(texts, encode_text(tokenizer, texts))) if texts else {}
        for row in parts:
            yield tuple([i for p in half for i in (ids[p] if isinstance(p, str) else (p,))] for half in row)


# The parts of a prompt and of its answer: texts, encoded each by itself, and the ids of special tokens between them.
Parts = tuple[list[str | int], list[str | int]]


def _chat_parts(tokenizer) -> Callable[[list[dict], str | None], Parts]:
    start, end = tokenizer.convert_tokens_to_ids([START_OF_TURN, END_OF_TURN])

    def write(messages: list[dict], answer: str | None) -> Parts:
        prompt: list[str | int] = []
        for message in messages:
            role, content = message["role"], message["content"]
            # An assistant's words are encoded apart from the header, as the model that wrote them saw it.
            texts = [f"{role}\n", content] if role == "assistant" else [f"{role}\n{content}"]
            prompt += [start, *texts, end, "\n"]
        return [*prompt, start, "assistant\n"], [] if answer is None else [answer, end]

    return write


def _plain_parts(tokenizer) -> Callable[[list[dict], str | None], Parts]:
    # Some tokenizers open every text with a token of their own (Llama's <s>).
    opening = [i for i in tokenizer("")["input_ids"][:1] if i == tokenizer.bos_token_id != tokenizer.eos_token_id]

    def write(messages: list[dict], answer: str | None) -> Parts:
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise BadInput(
                f"The tokenizer {tokenizer.name_or_path} has no chat template, and the prompt is a conversation of "
                f"{len(messages)} messages ({', '.join(m['role'] for m in messages)}). Give the prompt as text, or use "
                "a tokenizer with a chat template (lmkit.tokenization.chat.CHAT_TEMPLATE needs <|im_start|> and "
                "<|im_end|>)."
            )
        text = messages[0]["content"]
        return [*opening, text], [] if answer is None else [answer, stop_token_ids(tokenizer)[0]]

    return write


def _render_foreign(tokenizer, messages: list[dict], answer: str | None) -> tuple[list[int], list[int]]:
    prompt_ids = _apply(tokenizer, messages, add_generation_prompt=True)
    if answer is None:
        return prompt_ids, []
    stops = stop_token_ids(tokenizer)
    whole = _apply(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if whole[: len(prompt_ids)] != prompt_ids:  # a template that rewrites the turn, as those with hidden reasoning do
        return prompt_ids, [*encode_text(tokenizer, answer), stops[0]]
    words = whole[len(prompt_ids) :]
    length = next((n for n, i in enumerate(words) if i in stops), len(words))
    return prompt_ids, [*words[:length], stops[0]]


def _apply(tokenizer, messages: list[dict], **options) -> list[int]:
    """Ids by the tokenizer's own template; the names of its special tokens in the contents stay text."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, **options)["input_ids"]
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise BadInput(
            f"The chat template of {tokenizer.name_or_path} refuses a conversation of {roles}: {error}. "
            "Change the conversation's roles or the template."
        ) from None


def _messages(prompt: str | list[dict]) -> list[dict]:
    """A prompt as checked messages; it ends with a user's turn (or is a system message alone)."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadInput(
            "The prompt ends with an assistant's turn; it must end with the user's. Move that turn to the completion."
        )
    return messages


def _answer(completion: str | list[dict]) -> str:
    if isinstance(completion, str):
        return completion
    messages = _checked(completion, "completion")
    if [m["role"] for m in messages] != ["assistant"]:
        raise BadInput(
            f"The completion has the turns {', '.join(m['role'] for m in messages)}; wanted one assistant turn. "
            "Move the earlier turns to the prompt."
        )
    return messages[0]["content"]


def _checked(messages: list[dict], name: str) -> list[dict]:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadInput(f"The {name} is {messages!r}; wanted a text or a list of messages with role and content.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadInput(
                f"Message {number} of the {name} is {str(message)[:80]}; wanted a mapping with role and content, "
                "the content a text."
            )
        if message.get("role") not in ROLES or (message["role"] == "system" and number > 0):
            raise BadInput(
                f"Message {number} of the {name} has the role {message.get('role')!r}; wanted user or assistant, or "
                "system for the first message alone. Rename the roles of your data."
            )
    return list(messages)
