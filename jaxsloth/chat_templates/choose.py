"""get_chat_template: a tokenizer with a template chosen by name, or one's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from jaxsloth.data.catalogue import TEMPLATES, template_name, template_source
from jaxsloth.data.errors import DataError
from jaxsloth.data.templates import ChatTemplate

STANDARD: dict[str, str] = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
_OWN_EOS = "eos_token"
_EXAMPLE = [
    {"role": role, "content": content}
    for role, content in (("user", "How many?"), ("assistant", "Sixteen."), ("user", "Why?"), ("assistant", "Ducks."))
]


class _Templates(Mapping[str, tuple[str, str]]):
    """Name -> (Jinja text, the token that ends an answer; "eos_token" is the tokenizer's own)."""

    def __getitem__(self, name: str) -> tuple[str, str]:
        try:
            found = template_name(name)
        except DataError as error:
            raise KeyError(name) from error
        return template_source(found), TEMPLATES[found].stop or _OWN_EOS

    def __iter__(self) -> Iterator[str]:
        return iter(TEMPLATES)

    def __len__(self) -> int:
        return len(TEMPLATES)


CHAT_TEMPLATES: Mapping[str, tuple[str, str]] = _Templates()


def create_stopping_criteria(tokenizer: Any, stop_word: str = "eos_token") -> Any:
    """For ``model.generate(stopping_criteria=…)``: a row ends with stop_word ("eos_token": the tokenizer's EOS)."""
    from transformers import EosTokenCriteria, StoppingCriteriaList, StopStringCriteria

    if stop_word == _OWN_EOS:
        return StoppingCriteriaList([EosTokenCriteria(tokenizer.eos_token_id)])
    return StoppingCriteriaList([StopStringCriteria(tokenizer, stop_word)])


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str | None] = "chatml",
    mapping: Mapping[str, str] = STANDARD,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Gives a tokenizer a chat template; the tokenizer itself is changed and returned.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: a name (`jaxsloth.data.catalogue.TEMPLATES`), a Jinja text whose answers end in the tokenizer's EOS, or
            (Jinja text, the token that ends an answer); "eos_token" or None for that is the tokenizer's EOS.
        mapping: what the data calls the keys "role" and "content" and the speakers "user" and "assistant", for instance
            ``{"role": "from", "content": "value", "user": "human", "assistant": "gpt"}``. Messages with the standard keys are
            read too, and the text that is written stays the same.
        map_eos_token: make the token that ends an answer the tokenizer's EOS. One that the vocabulary lacks takes over the
            EOS' id, so that it is one token that the model knows how to end with. A padding token stays what it was.
        system_message: put first where a conversation has none.

    Raises:
        DataError: no such template, an unknown key in mapping, a system message for a template that writes none, a Jinja
            text that drops what a role says, or an EOS that can't be renamed.
    """
    source, stop, name = _resolve(tokenizer, chat_template)
    if name is not None and system_message is not None and "system" not in TEMPLATES[name].roles:
        raise DataError(f"template {name!r} writes no system message, and system_message came; leave it out")
    source = _renaming(mapping) + _system(system_message) + source
    if name is None:
        ChatTemplate(tokenizer, source).check_roles(_EXAMPLE)
        _check_system(tokenizer, source, system_message)
    tokenizer.chat_template = source
    if stop is not None and stop != tokenizer.eos_token:
        _end_with(tokenizer, stop, map_eos_token)
    return tokenizer


def _resolve(tokenizer: Any, chat_template: Any) -> tuple[str, str | None, str | None]:
    """(Jinja text, the token that ends an answer or None for the EOS, the catalogue's name or None)."""
    if isinstance(chat_template, tuple | list):
        if len(chat_template) < 2 or not isinstance(chat_template[0], str) or "{" not in chat_template[0]:
            raise DataError(f"a chat template of one's own must be (Jinja text, EOS token), got {chat_template!r}")
        stop = chat_template[1]
        return chat_template[0], None if stop == _OWN_EOS else stop, None
    if not isinstance(chat_template, str):
        raise DataError(f"chat_template must be a name, a Jinja text or a pair, got {chat_template!r}")
    if "{" in chat_template:
        return chat_template, None, None
    name = template_name(chat_template)
    return template_source(name, tokenizer), TEMPLATES[name].stop, name


def _renaming(mapping: Mapping[str, str]) -> str:
    """Jinja that gives messages their standard keys and speakers before the template reads them."""
    unknown = [key for key in mapping if key not in STANDARD]
    if unknown:
        raise DataError(f"mapping renames {', '.join(STANDARD)}, got {', '.join(map(repr, unknown))}")
    names = STANDARD | dict(mapping)
    if names == STANDARD:
        return ""
    role, content = _literal(names["role"]), _literal(names["content"])
    speakers = _literal({names["user"]: "user", names["assistant"]: "assistant"})
    return f"""\
{{%- set renamed = namespace(messages=[]) %}}
{{%- for message in messages %}}
    {{%- if {role} not in message and 'role' not in message %}}
        {{{{- raise_exception('a message must have the key ' ~ {role} ~ ', and it has: ' ~ message | join(', ')) }}}}
    {{%- endif %}}
    {{%- set speaker = message.get({role}, message.role) %}}
    {{%- set said = message.get({content}, message.get('content', '')) %}}
    {{%- set message = dict(message, role={speakers}.get(speaker, speaker), content=said) %}}
    {{%- set renamed.messages = renamed.messages + [message] %}}
{{%- endfor %}}
{{%- set messages = renamed.messages %}}
"""


def _literal(value: Any) -> str:
    """A text, or a dict of texts, as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)


def _system(system_message: str | None) -> str:
    if system_message is None:
        return ""
    first = _literal({"role": "system", "content": system_message})
    return f"{{%- if messages[0].role != 'system' %}}\n{{%- set messages = [{first}] + messages %}}\n{{%- endif %}}\n"


def _check_system(tokenizer: Any, source: str, system_message: str | None) -> None:
    if system_message and system_message.strip() not in ChatTemplate(tokenizer, source).render(_EXAMPLE):
        raise DataError("the chat template drops the system message; give one that writes it, or leave system_message out")


def _end_with(tokenizer: Any, stop: str, map_eos_token: bool) -> None:
    """Makes `stop` the EOS: by name where the vocabulary has it, else by giving it the EOS' place."""
    known = stop in tokenizer.get_vocab()
    if not map_eos_token:
        if not known:
            warnings.warn(
                f"the tokenizer has no {stop} token: answers end in several tokens, and generation will not stop at them. "
                "With map_eos_token=True it takes the EOS' place",
                stacklevel=3,
            )
        return
    if known:
        tokenizer.add_special_tokens({"eos_token": stop})
        return
    if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token is None:
        raise DataError(
            f"{stop} can't take the place of the tokenizer's EOS ({tokenizer.eos_token!r}): that needs a fast tokenizer "
            "with an EOS. Give a template that ends answers with {{ eos_token }}, or set map_eos_token=False"
        )
    _rename_token(tokenizer, tokenizer.eos_token, stop)


def _rename_token(tokenizer: Any, old: str, new: str) -> None:
    """Calls a token of a fast tokenizer by another name, with the same id, wherever the tokenizer speaks of it."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {renamed(key): renamed(part) for key, part in value.items()}
        if isinstance(value, list):
            return [renamed(part) for part in value]
        return new if value == old else value

    merges = state["model"].pop("merges", None)  # pairs of pieces; none of them is the EOS, and they are many
    state = {
        part: renamed(value) if part in ("added_tokens", "post_processor", "model") else value for part, value in state.items()
    }
    if merges is not None:
        state["model"]["merges"] = merges
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    for name, token in tokenizer.special_tokens_map.items():
        if str(token) == old:
            setattr(tokenizer, name, new)
