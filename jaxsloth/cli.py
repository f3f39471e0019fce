"""The commands: train, generate, evaluate, convert, check, inspect, parity, info, schema."""

from __future__ import annotations

import json
import logging
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxsloth.terminal import console

app = typer.Typer(help="LoRA and QLoRA fine-tuning on PyTorch and on JAX, with the same numbers.", no_args_is_help=True)
_USER_ERROR, _OWN_ERROR = 2, 1


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    _state["debug"] = debug


_state: dict[str, bool] = {"debug": False}


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. optimizer.learning_rate=1e-3")] = None,
    backend: Annotated[str | None, typer.Option(help="torch or jax; overrides the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    resume_anyway: Annotated[
        list[str] | None,
        typer.Option(help="What may have changed since: data, base, template, recipe or files; may be given again."),
    ] = None,
    stop_after: Annotated[int | None, typer.Option(help="Stop at this step; the schedule stays the whole run's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
) -> None:
    """Train a recipe. Under torchrun every process trains its share of each batch."""
    from jaxsloth.recipe import load_recipe
    from jaxsloth.training import run

    if quiet:
        logging.getLogger("jaxsloth").setLevel(logging.WARNING)
    chosen = [*(overrides or []), *([f"backend={backend}"] if backend is not None else [])]
    anyway = resume_anyway or ()
    run.train(load_recipe(recipe, chosen), resume=resume, resume_anyway=anyway, stop_after=stop_after, quiet=quiet)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[str, typer.Option(help="A folder, a .gguf file, package:NAME/file, or a Hugging Face name.")],
    adapter: Annotated[str | None, typer.Option(help="The folder of a PEFT adapter for that model.")] = None,
    backend: Annotated[str | None, typer.Option(help="torch or jax.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Store the linear layers as NF4.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    max_new_tokens: int = 128,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token. Left out, the checkpoint's generation_config.json counts, else 0."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Left out, generation_config.json's, else 1.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be given again.")] = None,
    seed: int = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
) -> None:
    """Answer a prompt, as it is written."""
    from jaxsloth.convert.checkpoint import resolve_path
    from jaxsloth.convert.peft_adapter import base_model_of, find_adapter, fitted_adapter
    from jaxsloth.data.templates import ChatTemplate
    from jaxsloth.frontend.loading import load
    from jaxsloth.generation import GenerationSettings, answer_texts, answering

    folder = find_adapter(model) if adapter is None else resolve_path(adapter)
    if adapter is None and folder is not None:
        model = base_model_of(folder)
    loaded = load(model, backend=backend, load_in_4bit=load_in_4bit, dtype=dtype)
    tokenizer = loaded.tokenizer
    if folder is not None:
        loaded.model.add_adapters(*fitted_adapter(folder, loaded.model.spec))
    text = prompt
    if not raw and getattr(tokenizer, "chat_template", None):
        text = ChatTemplate(tokenizer).render([{"role": "user", "content": prompt}], answer_follows=True)
    given: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    if temperature is not None:
        given |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
    settings = answering(loaded.checkpoint.generation, {name: value for name, value in given.items() if value is not None})
    ends = (*loaded.model.spec.eos_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))
    chosen = GenerationSettings(
        max_new_tokens=max_new_tokens, stop=tuple(stop or ()), seed=seed, eos_ids=tuple(dict.fromkeys(ends)), **settings
    )
    answer_texts(loaded.model, tokenizer, [text], chosen, lambda row, piece: print(piece, end="", flush=True))
    print()


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="What generate takes, or the folder of an adapter, whose base is then loaded.")],
    data: Annotated[str, typer.Option(help="A .json, .jsonl, .csv or .parquet file, package:NAME/file, or a data set's name.")],
    metrics: Annotated[
        str,
        typer.Option(
            help="loss, accuracy (share of the answers' tokens that are the likeliest), exact_match, f1 (SQuAD's), rouge, bleu."
        ),
    ] = "loss,accuracy",
    adapter: Annotated[str | None, typer.Option(help="The folder of a PEFT adapter for that model.")] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Measure the base too, and the change.")] = False,
    split: Annotated[str, typer.Option(help="The data set's split; a file is one split, train.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first rows only.")] = None,
    data_format: Annotated[str, typer.Option("--format", help="As a recipe's data.format.")] = "auto",
    column: Annotated[list[str] | None, typer.Option(help="expected=field, e.g. prompt=question; may be given again.")] = None,
    template: Annotated[
        str | None, typer.Option(help="A chat template's name, or Jinja; the tokenizer's own if left out.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message for conversations that have none.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens that a row may have.")] = 2048,
    truncation: Annotated[bool, typer.Option("--truncation", help="Cut longer rows instead of refusing them.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that a generated answer may have.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    backend: Annotated[str | None, typer.Option(help="torch or jax.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Store the linear layers as NF4.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the scores and the answers.")] = None,
) -> None:
    """Measure a model on rows: loss on their answers, and answers of its own against theirs."""
    from jaxsloth.evaluation import run

    rows = run.data_settings(
        path=data,
        split=split,
        format=data_format,
        columns=run.pairs(column or []),
        template=template,
        system=system,
        max_length=max_length,
        truncation=truncation,
    )
    settings = run.EvaluationSettings(
        model=model,
        data=rows,
        metrics=metrics.split(","),
        adapter=adapter,
        compare_base=compare_base,
        limit=limit,
        backend=backend,
        dtype=run.dtype_name(dtype),
        load_in_4bit=load_in_4bit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        json_file=json_file,
    )
    console().print(run.table(run.evaluate(settings)))


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="A folder (safetensors or orbax), a .gguf file, package:NAME/file, or a Hugging Face name.")
    ],
    destination: Annotated[Path, typer.Argument(help="A folder that is not there yet; for gguf a file.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf (safetensors), bnb-4bit, bnb-8bit, gguf, orbax, maxtext, tunix; of adapters peft, gguf-lora, orbax; "
            "of a run's checkpoint orbax, and run-state from that."
        ),
    ],
    merge: Annotated[Path | None, typer.Option(help="An adapter (PEFT folder, GGUF) to add to the weights first.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that a converted adapter belongs to.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if left out.")] = None,
    outtype: Annotated[
        str | None, typer.Option(help="Of gguf: f32, f16 (if left out), bf16, q8_0, q4_0 … q5_1, q2_k … q6_k, iq4_nl, iq4_xs.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="The most that a file may hold, e.g. 4GB.")] = "4GiB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the destination.")] = False,
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="Values too large for the type become the largest there is; counted.")
    ] = False,
    checked: Annotated[bool, typer.Option("--check", help="Run what was written beside the source; exit 1 on a miss.")] = False,
    check_prompts: Annotated[Path | None, typer.Option(help="Of --check: a file with a prompt a line.")] = None,
) -> None:
    """Write a checkpoint in another format, tensor by tensor."""
    from jaxsloth.convert.check_report import checks_out, prepared
    from jaxsloth.convert.files import parse_size
    from jaxsloth.convert.report import converted, show_plan
    from jaxsloth.convert.run import Options, plan
    from jaxsloth.training.state_formats import convert_state, is_state

    if is_state(source, to):
        if dry_run or checked or check_prompts or merge or base or dtype or outtype or allow_overflow:
            raise ValueError(
                "a run's state or an adapter is converted as it is; leave --dry-run, --merge, --base, --dtype, --outtype, "
                "--allow-overflow and --check out"
            )
        console().print(f"wrote {convert_state(Path(source), destination, to, overwrite=overwrite)}")  # type: ignore[arg-type]
        return
    _check_taken(to, outtype, dtype, base)
    kind = (outtype or "f16").lower()
    options = Options(merge, dtype, kind, parse_size(shard_size), overwrite, None, base, allow_overflow)  # type: ignore[arg-type]
    found, screen = plan(source, destination, to, options), console()  # type: ignore[arg-type]
    prompts = prepared(check_prompts, found, source) if checked or check_prompts else None
    show_plan(found, screen, whole=dry_run)
    if not dry_run:
        written = converted(found, screen)
        if prompts is not None and not checks_out(source, written, merge, prompts, screen, base=base, written=True):
            raise typer.Exit(1)


def _check_taken(to: str, outtype: str | None, dtype: str | None, base: str | None) -> None:
    """ValueError where an option would change nothing of what is written."""
    from jaxsloth.convert.run import ADAPTERS

    blocks = to in ("gguf", "gguf-lora")
    if outtype is not None and not blocks:
        raise ValueError(
            f"--outtype is of --to gguf and gguf-lora, and --to {to} was asked for; --dtype says how hf stores values"
        )
    if dtype is not None and (blocks or to == "peft"):
        instead = "--outtype says how values are stored" if blocks else "it is written in float32"
        raise ValueError(f"--dtype has no effect on --to {to}; leave it out ({instead})")
    if base is not None and to not in ADAPTERS:
        raise ValueError(f"--base is of adapters (--to peft, gguf-lora), and --to {to} was asked for; leave it out")


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="What is right: a folder, a .gguf file, package:NAME/file, or a hub name.")],
    destination: Annotated[Path, typer.Argument(help="What is to hold the same model in another format.")],
    merge: Annotated[Path | None, typer.Option(help="The PEFT adapter that the destination holds merged.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line, instead of the default ones.")] = None,
    base: Annotated[str | None, typer.Option(help="Of two adapters: the model that they belong to.")] = None,
) -> None:
    """Run both, each by its ecosystem's own reader, and compare: KL, likeliest tokens, token ids. Exit 1 on a miss."""
    from jaxsloth.convert.check_report import checks_out, prepared

    if not checks_out(source, destination, merge, prepared(prompts), console(), base=base):
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="What convert takes, or the folder of a PEFT adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint or an adapter holds: kind, shape, tensors, dtypes, sizes."""
    from jaxsloth.convert.report import describe, show_description

    found = describe(path)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_description(found, console())


@app.command()
def parity(
    model: Annotated[str | None, typer.Option(help="The checkpoint; SmolLM2-135M-Instruct where none is named.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all numbers.")] = None,
) -> None:
    """Measure both backends against bitsandbytes, transformers, PEFT and TRL; exit 1 where a bar is missed."""
    from jaxsloth.parity import run

    if not run(model, json_file):
        raise typer.Exit(1)


@app.command()
def info(
    overrides: Annotated[list[str] | None, typer.Argument(help="With --recipe: key=value, e.g. lora.dropout=0.05")] = None,
    model: Annotated[str | None, typer.Option(help="What generate takes: how its blocks train, by its config alone.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe, whose model and settings count.")] = None,
    families: Annotated[bool, typer.Option("--families", help="What each family's blocks have, and how they train.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, devices, model families, what trains and decodes here, and each op's implementation; or, of a model, a recipe
    or every family, how each kind of block trains on each backend."""
    from jaxsloth.info import collect, model_passes, show, show_families, show_model
    from jaxsloth.recipe import RecipeError, load_recipe

    if overrides and recipe is None:
        raise RecipeError(f"{overrides[0]} changes a recipe; name it with --recipe")
    chosen = None if recipe is None else load_recipe(recipe, overrides or [])
    of_model = model is not None or chosen is not None
    if families and of_model:
        raise RecipeError("--families lists all of them; leave it out with --model or --recipe")
    if families:
        from jaxsloth.extras import require

        require("frontend", "jaxsloth info --families")
        from jaxsloth.frontend.family_table import family_passes

        found, shown = family_passes(), show_families
    else:
        found, shown = (model_passes(model, chosen), show_model) if of_model else (collect(), show)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        shown(found, console())


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema."""
    from jaxsloth.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. A user's mistake is one message on stderr and exit code 2; anything else is one too, with the file that
    was read last, and exit code 1. With --debug both keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal can't show
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("jaxsloth").setLevel(logging.INFO)
    try:
        app(args=arguments)
    except Exception as error:
        if _state["debug"]:
            raise
        users = _is_users(error)
        print(f"error: {error if users and str(error) else _foreseen_by_nobody(error)}", file=sys.stderr)
        sys.exit(_USER_ERROR if users else _OWN_ERROR)


def _foreseen_by_nobody(error: Exception) -> str:
    from jaxsloth.foreign import last_read

    text = " ".join(str(error).split())
    file = last_read()
    at = f" (the file read last: {file})" if file else ""
    return f"{type(error).__name__}: {text}{at}; run jaxsloth --debug … for the traceback"


def _is_users(error: Exception) -> bool:
    """Whether an error is one that this project raises for wrong input: its own types, and ValueErrors that its code raised."""
    from jaxsloth.extras import MissingExtraError
    from jaxsloth.kernels.registry import RefusedError
    from jaxsloth.training.loop import NonFiniteLossError

    if isinstance(error, MissingExtraError | RefusedError | NonFiniteLossError):
        return True
    if not isinstance(error, ValueError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("jaxsloth")
