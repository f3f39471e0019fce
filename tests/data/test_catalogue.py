"""Named templates against what the makers publish: their templates, their encoders, their documentation."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from jaxsloth.data.catalogue import TEMPLATES, template_name, template_source
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation
from jaxsloth.data.templates import ChatTemplate
from tests.support.real_tokenizers import MISTRAL_FILES, llama3, mistral, mistral_file, qwen
from tests.support.tiny import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": " How many eggs? "},
    {"role": "assistant", "content": "Sixteen.\n\nA day."},
    {"role": "user", "content": "And why is the sky blue? é😀"},
    {"role": "assistant", "content": "Because of light 😀 \n"},
]
THOUGHTS = [
    TURNS[0],
    {"role": "assistant", "content": "<think>\nHens.\n</think>\n\nSixteen."},
    TURNS[2],
    {"role": "assistant", "content": "<think>\nRayleigh.\n</think>\n\nLight."},
]
CALL = {"type": "function", "function": {"name": "count", "arguments": {"bird": "duck", "days": 1}}}
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "16 eggs"},
    TURNS[1],
]
TWO_RESULTS = [*CALLS[:3], {"role": "tool", "content": "17 eggs"}, TURNS[1]]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "count",
            "description": "Counts eggs",
            "parameters": {"type": "object", "properties": {"bird": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    return render_jinja_template(conversations=[messages], chat_template=source, **TOKENS, **settings)[0][0]


def token_ids(tokenizer: Any, messages: list[dict[str, Any]], source: str, **settings: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, chat_template=source, **settings)["input_ids"]


def published(name: str) -> str:
    """The maker's template, from TRL, which stores them to recognise models by."""
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def cases() -> list[Any]:
    return [*_cases()]


def _cases():
    plain = {
        "question": (TURNS[:1], {"add_generation_prompt": True}),
        "answer": (TURNS[:2], {}),
        "turns": (TURNS, {}),
        "next": (TURNS[:3], {"add_generation_prompt": True}),
    }
    system = {f"system-{case}": ([SYSTEM, *messages], settings) for case, (messages, settings) in plain.items()}
    tools = {
        "calls": (CALLS, {}),
        "tools": (CALLS, {"tools": TOOLS}),
        "system-tools": ([SYSTEM, *CALLS[:3]], {"tools": TOOLS, "add_generation_prompt": True}),
    }
    several = {"two-results": (TWO_RESULTS, {"tools": TOOLS})}
    thoughts = {
        "thoughts": (THOUGHTS, {}),
        "no-thinking": (THOUGHTS[:3], {"enable_thinking": False, "add_generation_prompt": True}),
        "reasoning": ([TURNS[0], {**TURNS[1], "reasoning_content": "Hens."}, *CALLS[1:]], {}),
    }
    llama = {
        "date": (TURNS, {"date_string": "1 Jan 2025"}),
        "functions-in-system": ([SYSTEM, *CALLS], {"tools": TOOLS, "tools_in_user_message": False}),
        "builtin": (CALLS[:2], {"builtin_tools": ["count", "code_interpreter"]}),
    }
    if_text = {case: (messages, settings) for case, (messages, settings) in llama.items() if case != "builtin"}
    text_arguments = [TURNS[0], {**CALLS[1], "tool_calls": [{"function": {"name": "count", "arguments": {"bird": "duck"}}}]}]
    for ours, theirs, groups in (
        ("llama-3", "llama3", (plain, system)),
        ("llama-3.1", "llama3_1", (plain, system, tools, if_text, {"builtin": (text_arguments, llama["builtin"][1])})),
        ("qwen-2.5", "qwen2_5", (plain, system, tools, several)),
        ("qwen-3", "qwen3", (plain, system, tools, several, thoughts)),
        ("gemma", "gemma", (plain,)),
        ("gemma-3", "gemma3", (plain, system)),
        ("phi-3", "phi3", (plain, system)),
    ):
        for group in groups:
            for case, (messages, settings) in group.items():
                yield pytest.param(ours, theirs, messages, settings, id=f"{ours}-{case}")


@pytest.mark.parametrize(("ours", "theirs", "messages", "settings"), cases())
def test_the_makers_published_template(ours, theirs, messages, settings):
    expected = render(published(theirs), messages, **settings)
    if ours == "phi-3" and not settings:  # the end of text behind the conversation, which we leave out
        assert expected.endswith("</s>")
        expected = expected.removesuffix("</s>")
    assert render(template_source(ours, byte_tokenizer()), messages, **settings) == expected


PIRATE = [
    {"role": "system", "content": "You are a pirate."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Arr"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. "
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize(
    ("name", "messages", "text", "answer_follows"),
    [
        # model cards of microsoft/phi-4 and HuggingFaceH4/zephyr-7b-beta
        (
            "phi-4",
            PIRATE,
            "<|im_start|>system<|im_sep|>You are a pirate.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
            "<|im_start|>assistant<|im_sep|>Arr<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        ("zephyr", PIRATE, "<|system|>\nYou are a pirate.</s>\n<|user|>\nHi</s>\n<|assistant|>\nArr</s>\n", "<|assistant|>\n"),
        # FastChat's documentation of Vicuna 1.1
        ("vicuna", PIRATE[1:] * 2, f"<s>{VICUNA}{'USER: Hi ASSISTANT: Arr</s>' * 2}", "ASSISTANT:"),
        ("vicuna", PIRATE, "<s>You are a pirate. USER: Hi ASSISTANT: Arr</s>", "ASSISTANT:"),
        # Stanford Alpaca's prompt, with a line break before the response
        ("alpaca", PIRATE[1:], f"<s>{ALPACA}\n\n### Instruction:\nHi\n\n### Response:\nArr</s>", "\n\n### Response:\n"),
        ("alpaca", PIRATE, "<s>You are a pirate.\n\n### Instruction:\nHi\n\n### Response:\nArr</s>", "\n\n### Response:\n"),
    ],
)
def test_the_makers_documentation(name, messages, text, answer_follows):
    source = template_source(name, byte_tokenizer())
    assert render(source, messages) == text
    assert render(source, messages, add_generation_prompt=True) == text + answer_follows


def test_chatml_is_smollm2s_own(smollm2):
    for messages in ([SYSTEM, *TURNS], [SYSTEM, *TURNS[:1]]):
        for answer_follows in (False, True):
            settings = {"tokenize": False, "add_generation_prompt": answer_follows}
            own = smollm2.apply_chat_template(messages, **settings)
            ours = smollm2.apply_chat_template(messages, chat_template=template_source("chatml", smollm2), **settings)
            assert ours == own


def test_llama_3_is_metas_encoder():
    meta = ChatFormat(MetaTokenizer.get_instance())
    messages = [SYSTEM, TURNS[1] | {"role": "user"}, TURNS[1], TURNS[2]]
    expected = meta.encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens
    tokenizer = llama3()
    source = template_source("llama-3", tokenizer)
    assert token_ids(tokenizer, messages, source, add_generation_prompt=True) == expected


@pytest.mark.parametrize("version", MISTRAL_FILES)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("count", [1, 3])
def test_mistral_is_mistral_commons_encoder(version, system, count):
    # Without spaces at the borders: SentencePiece cuts those that meet differently when the parts are encoded one by one.
    messages = [*system, *[{**turn, "content": turn["content"].strip()} for turn in TURNS[:count]]]
    judge = MistralTokenizer.from_file(str(mistral_file(version)))
    expected = judge.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    tokenizer = mistral(version)
    source = template_source("mistral", tokenizer)
    assert token_ids(tokenizer, messages, source) == expected
    answered = [*messages, {"role": "assistant", "content": "Light."}]
    own = tokenizer.apply_chat_template(answered, tokenize=False)
    assert tokenizer.apply_chat_template(answered, chat_template=source, tokenize=False) == own


def tokenizer_of(name, smollm2):
    return {
        "qwen-2.5": qwen,
        "qwen-3": qwen,
        "llama-3": llama3,
        "llama-3.1": llama3,
        "mistral": lambda: mistral("v3-tekken"),
    }.get(name, lambda: smollm2)()


@pytest.mark.filterwarnings("ignore:the tokenizer has no")
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_are_learnt(name, smollm2):
    tokenizer = tokenizer_of(name, smollm2)
    system = [] if name == "gemma" else [SYSTEM]
    conversation = Conversation([*system, *TURNS])
    tokens, learn = ChatTemplate(tokenizer, name).encode(conversation)
    stop = TEMPLATES[name].stop or tokenizer.eos_token
    learnt = tokenizer.decode(tokens[learn])
    first, last, end = (part.strip() for part in learnt.replace(stop, "\0").split("\0"))
    first = first.removeprefix("<think>\n\n</think>").strip()
    last = last.removeprefix("<think>\n\n</think>").strip()
    assert (first, last, end) == (TURNS[1]["content"], TURNS[3]["content"].strip(), "")
    text = tokenizer.decode(tokens)
    assert learnt.count(stop) == 2 and text.count(TURNS[1]["content"]) == 1
    assert np.array_equal(tokens, token_ids(tokenizer, conversation.messages, template_source(name, tokenizer)))


@pytest.mark.filterwarnings("ignore:the tokenizer has no")
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_does_not_write_it_refuses(name, smollm2):
    template = ChatTemplate(tokenizer_of(name, smollm2), name)
    stranger = [TURNS[0], {"role": "critic", "content": "No."}]
    with pytest.raises(DataError, match=f"template '{name}' writes the roles .*critic came"):
        template.encode(Conversation(stranger))
    if not TEMPLATES[name].tools:
        with pytest.raises(DataError, match=f"template '{name}' writes no tools"):
            template.encode(Conversation(CALLS[:2]))


def test_names():
    assert template_name("Qwen2.5") == "qwen-2.5"
    assert template_name("llama-3.2") == "llama-3.1"
    with pytest.raises(DataError, match=r"one of llama-3, llama-3.1, chatml.*got 'phi-44'; did you mean 'phi-4'"):
        template_name("phi-44")
