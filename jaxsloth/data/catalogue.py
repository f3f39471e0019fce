"""The chat templates that go by a name: a Jinja text each, in ``jinja/``, and what must be known beside it.

Each text is written after what the model's makers publish (their tokenizer's template, their documentation or their own
encoder) and renders the same conversations to the same characters; tests/data/test_catalogue.py compares them. What the
assistant says, with the token that ends its turn, stands inside ``{% generation %}`` tags: transformers', TRL's and this
project's mask of answers, which no search through the text has to find again.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jaxsloth.data.errors import DataError

_CHAT = ("system", "user", "assistant")


@dataclass(frozen=True)
class NamedTemplate:
    """What is known of a template beside its text.

    stop: the token that ends an answer; None is the tokenizer's own EOS.
    roles: those that it can write; any other is refused, as no turn may vanish from the text.
    tools: whether it writes functions (``tools=``) and calls of them.
    """

    stop: str | None
    roles: tuple[str, ...] = _CHAT
    tools: bool = False


TEMPLATES: dict[str, NamedTemplate] = {
    "llama-3": NamedTemplate("<|eot_id|>", (*_CHAT, "tool")),
    "llama-3.1": NamedTemplate("<|eot_id|>", (*_CHAT, "tool", "ipython"), tools=True),
    "chatml": NamedTemplate("<|im_end|>", (*_CHAT, "tool")),
    "qwen-2.5": NamedTemplate("<|im_end|>", (*_CHAT, "tool"), tools=True),
    "qwen-3": NamedTemplate("<|im_end|>", (*_CHAT, "tool"), tools=True),
    "mistral": NamedTemplate(None),
    "gemma": NamedTemplate("<end_of_turn>", ("user", "assistant")),
    "gemma-3": NamedTemplate("<end_of_turn>"),
    "phi-3": NamedTemplate("<|end|>"),
    "phi-4": NamedTemplate("<|im_end|>"),
    "zephyr": NamedTemplate(None),
    "alpaca": NamedTemplate(None),
    "vicuna": NamedTemplate(None),
}
# Other spellings that notebooks use, and later models that kept a template.
_ALIASES = {
    "llama3": "llama-3",
    "llama-31": "llama-3.1",
    "llama3.1": "llama-3.1",
    "llama-3.2": "llama-3.1",
    "llama-3.3": "llama-3.1",
    "qwen2.5": "qwen-2.5",
    "qwen25": "qwen-2.5",
    "qwen-25": "qwen-2.5",
    "qwen3": "qwen-3",
    "gemma2": "gemma",
    "gemma-2": "gemma",
    "gemma3": "gemma-3",
    "phi-3.5": "phi-3",
    "phi-35": "phi-3",
}


def template_name(name: str) -> str:
    """The catalogue's name for a name or another spelling of it.

    Raises:
        DataError: no template goes by it.
    """
    known = _ALIASES.get(name.lower(), name.lower())
    if known not in TEMPLATES:
        near = difflib.get_close_matches(known, [*TEMPLATES, *_ALIASES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"a chat template must be a Jinja text or one of {', '.join(TEMPLATES)}, got {name!r}; {hint}"
            "None takes the tokenizer's own"
        )
    return known


def template_source(name: str, tokenizer: Any = None) -> str:
    """The Jinja text of a template of the catalogue.

    It refuses what it would not write: other roles, and functions where it has none. Mistral's depends on the tokenizer; for
    None it is that of a vocabulary without tokens for turns.
    """
    known = TEMPLATES[name]
    text = files("jaxsloth.data").joinpath("jinja", f"{name}.jinja").read_text(encoding="utf-8")
    style = ""
    if name == "mistral":
        style = "{%- set style = " + json.dumps(_mistral_style(tokenizer)) + " %}\n"
    return _refusals(name, known) + style + text


def _refusals(name: str, known: NamedTemplate) -> str:
    lines = [
        "{%- for message in messages if message.role not in " + json.dumps(known.roles) + " %}",
        "    {{- raise_exception(\"template '" + name + "' writes the roles " + ", ".join(known.roles) + ', and "',
        '        ~ message.role ~ " came: it would be dropped") }}',
        "{%- endfor %}",
    ]
    if not known.tools:
        lines += [
            "{%- if tools or messages | selectattr('tool_calls', 'defined') | selectattr('tool_calls') | list %}",
            "    {{- raise_exception(\"template '" + name + "' writes no tools and no calls of them\") }}",
            "{%- endif %}",
        ]
    return "\n".join(lines) + "\n"


def _mistral_style(tokenizer: Any) -> dict[str, str]:
    """How a Mistral with this tokenizer writes turns: as mistral-common's v1, v2 and v3, or v7, SentencePiece or Tekken.

    system: "first" and "last" put the system message before the first or the last question, "tags" into its own. Tekken files
    of v3 and v7 may hold the same tokens, so a template that came with the tokenizer tells more than they do.
    """
    if tokenizer is None or "[INST]" not in (vocab := tokenizer.get_vocab()):
        return {"open": " [INST] ", "close": " [/INST]", "answer": " ", "system": "first"}
    space = " " if "▁" in vocab else ""  # SentencePiece puts a space before every piece of text; Tekken has none
    own = tokenizer.chat_template
    tags = "[SYSTEM_PROMPT]" in (own if isinstance(own, str) and "[INST]" in own else vocab)
    return {"open": f"[INST]{space}", "close": "[/INST]", "answer": space, "system": "tags" if tags else "last"}
