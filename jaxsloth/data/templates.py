"""Conversations → tokens through a chat template, and which of the tokens are learnt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np

from jaxsloth.data.catalogue import TEMPLATES, template_name, template_source
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation, Message, content_text
from jaxsloth.data.limited import TemplateLimitError, check_size, check_template, limited
from jaxsloth.foreign import check_text, shown

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})
_PROBE = "probe{}of{}"
Span = tuple[int, int]
Encoded = tuple[np.ndarray, np.ndarray]


class ChatTemplate:
    """A tokenizer with a Jinja chat template.

    Args:
        tokenizer: a transformers tokenizer. Its rendering is used, so texts are those of its apply_chat_template.
        template: a name of the catalogue, a Jinja template, or None for the tokenizer's own.

    Raises:
        DataError: the tokenizer has no template and none is given, or no template goes by the name.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._written: set[str] = set()  # roles that the template was seen to write
        self._takes_parts: bool | None = None  # whether it reads content that is a list of parts; None: not looked at yet
        self.where = (
            "data.template" if template is not None else f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        )
        if template is None:
            try:
                self.source: str = tokenizer.get_chat_template()
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(
                    "the tokenizer has no chat template, and conversations need one: set data.template to a name such as "
                    "'chatml' or to a Jinja template, or use format 'text'"
                ) from error
        elif "{" in template:
            self.source = template
        else:
            name = template_name(template)
            stop = TEMPLATES[name].stop
            if stop is not None and stop not in tokenizer.get_vocab():
                warnings.warn(
                    f"the tokenizer has no {stop} token: template {name!r} writes it as several tokens, and generation will "
                    "not stop at them. A template that ends turns with {{ eos_token }} suits this model better",
                    stacklevel=2,
                )
            self.source = template_source(name, tokenizer)
        if not isinstance(self.source, str):
            raise DataError(f"{self.where} must be text, got {shown(self.source)}")
        self._refusing(check_template, self.source)
        self.marks_answers = _GENERATION_TAG.search(self.source) is not None

    def render(
        self, messages: Sequence[Message], answer_follows: bool = False, settings: Mapping[str, Any] = NO_SETTINGS
    ) -> str:
        """The conversation's text; answer_follows adds the header after which the assistant answers. settings: as
        `Conversation` has them."""
        return self._refusing(
            self.tokenizer.apply_chat_template,
            self._readable(messages),
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=answer_follows,
            **settings,
        )

    def _readable(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: one that reads no parts of text gets them joined."""
        if all(isinstance(message["content"], str) for message in messages):
            return list(messages)
        if self._takes_parts is None:
            probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE.format(0, "user")}]}]
            apply = self.tokenizer.apply_chat_template
            try:
                text = self._refusing(apply, probe, chat_template=self.source, tokenize=False)
            except DataError:
                text = ""
            self._takes_parts = _PROBE.format(0, "user") in text and "'type'" not in text
        if self._takes_parts:
            return list(messages)
        return [message | {"content": content_text(message)} for message in messages]

    def _refusing(self, render: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """What a template does is not ours: whatever it raises is an error of the data, and it may not run for ever."""
        try:
            with limited():
                return check_size(render(*arguments, **settings))
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{self.where} is no Jinja template: line {error.lineno}: {error}") from error
        except jinja2.TemplateError as error:
            raise DataError(f"{self.where} refuses the conversation: {error}") from error
        except TemplateLimitError as error:
            raise DataError(f"{self.where} can't be run: {error}") from error
        except RecursionError as error:
            raise DataError(f"{self.where} calls itself without end, or is nested too deeply") from error
        except Exception as error:
            raise DataError(f"{self.where} fails: {type(error).__name__}: {error}") from error

    def encode(self, conversation: Conversation, response_only: bool = True) -> Encoded:
        """Tokens (int32 ``[length]``) and which of them are learnt (bool ``[length]``).

        Learnt are the assistant's contents and what the template puts behind them (the end-of-turn token, perhaps a line
        break), not their headers; without response_only, every token. A template with ``{% generation %}`` tags says itself
        what is learnt. No special token is added to those that the template writes, so none is doubled.

        Raises:
            DataError: the template refuses the conversation or drops a role of it, or it can't be split into prompts and
                answers.
        """
        self.check_roles(conversation.messages, conversation.settings)
        if response_only and self.marks_answers:
            return tokenize_spans(self.tokenizer, *self._tagged_spans(conversation))
        render = partial(self.render, settings=conversation.settings)
        text = render(conversation.messages)
        if not response_only:
            tokens = np.array(self.tokenizer(check_text(text, DataError), add_special_tokens=False)["input_ids"], np.int32)
            return tokens, np.ones(tokens.shape, bool)
        spans = answer_spans(render, conversation, text)
        return tokenize_spans(self.tokenizer, text, spans)

    def _tagged_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation's text, and where the answers that are learnt stand in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = self._refusing(
            render_jinja_template,
            conversations=[self._readable(conversation.messages)],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **(self.tokenizer.special_tokens_map | dict(conversation.settings)),
        )
        skipped = sum(message["role"] == "assistant" for message in conversation.messages[: conversation.first_learnt])
        return texts[0], spans[0][skipped:]

    def check_roles(self, messages: Sequence[Message], settings: Mapping[str, Any] = NO_SETTINGS) -> None:
        """That what each role says is in the text: looked at once for each, with marks in place of what it says.

        Raises:
            DataError: the template drops a role, or refuses the conversation.
        """
        for role in sorted({message["role"] for message in messages} - self._written):
            marks = {
                number: _PROBE.format(number, role)
                for number, message in enumerate(messages)
                if message["role"] == role and message["content"] and not message.get("tool_calls")
            }
            if not marks:
                continue
            plain = [m | {"content": content_text(m)} for m in messages]
            marked = [m | {"content": marks.get(number, m["content"])} for number, m in enumerate(plain)]
            text = self.render(marked, settings=settings)
            if any(mark not in text for mark in marks.values()):
                raise DataError(
                    f"the chat template drops the role {role!r}: what its messages say is not in the rendered text. Give a "
                    "template that writes it, or remove those messages"
                )
            self._written.add(role)


def answer_spans(render: Callable[..., str], conversation: Conversation, text: str) -> list[Span]:
    """Where the assistant's answers are in the rendered text: (first character, end) of each, in order.

    An answer reaches from the end of the conversation before it, rendered with the header of an answer, to the end of the
    conversation with it. Both must be beginnings of the whole text.

    Raises:
        DataError: they are not (a template that rewrites earlier turns).
    """
    spans = []
    messages = conversation.messages
    for number in range(conversation.first_learnt, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        before, turn = render(messages[:number], answer_follows=True), render(messages[: number + 1])
        if not (turn.startswith(before) and text.startswith(turn)):
            raise DataError(
                f"the chat template can't be split into prompts and answers: what it writes for messages[:{number + 1}] is not "
                "the beginning of the whole conversation. Set data.template to 'chatml' or to a template whose answers are "
                "inside {% generation %} tags, or set data.response_only to false"
            )
        start = len(before)
        if before == render(messages[:number]):  # no header was added: the template may write one all the same
            start = turn.find(content_text(messages[number]).strip(), start)
            if start < 0:
                raise DataError(
                    f"the chat template adds no header when asked for one, and the content of messages[{number}] is not in "
                    "its text as it is, so its answer can't be found. Give a template that obeys add_generation_prompt"
                )
        spans.append((start, len(turn)))
    return spans


def tokenize_spans(tokenizer: Any, text: str, spans: Sequence[Span]) -> Encoded:
    """The text's tokens, and which of them hold a part of one of the spans (those across a border do)."""
    check_text(text, DataError)
    if not tokenizer.is_fast:
        return _tokenize_spans_by_prefix(tokenizer, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    start, end = offsets[:, 0], offsets[:, 1]
    learn = np.zeros(len(offsets), bool)
    for first, last in spans:
        # Byte-level tokenizers may trim whitespace off the offsets: a token of spaces alone is then the empty range at its
        # end, so an empty range belongs to the text before it.
        learn |= (end > first) & ((start < last) | (end <= last))
    return np.array(encoded["input_ids"], np.int32), learn


def _tokenize_spans_by_prefix(tokenizer: Any, text: str, spans: Sequence[Span]) -> Encoded:
    """For tokenizers without offsets: a border lies where the tokens of the text up to it leave those of the whole text."""
    tokens = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def border(characters: int) -> int:
        prefix = np.array(tokenizer(text[:characters], add_special_tokens=False)["input_ids"], np.int32)
        shared = min(len(prefix), len(tokens))
        different = np.flatnonzero(prefix[:shared] != tokens[:shared])
        return int(different[0]) if different.size else shared

    learn = np.zeros(len(tokens), bool)
    for first, last in spans:
        learn[border(first) : border(last)] = True
    return tokens, learn
