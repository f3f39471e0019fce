"""A recipe run from end to end: everything checked first, then the model built, trained, saved and summed up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from jaxsloth.backend import (
    BACKENDS,
    Backend,
    BackendUnavailableError,
    BuildOptions,
    DeviceInfo,
    DtypeName,
    Model,
    OptimizerOptions,
    load_backend,
)
from jaxsloth.batch import check_length
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.data.encode import Example
from jaxsloth.data.prepare import prepare
from jaxsloth.data.step_batches import StepBatches, eval_batches
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.extras import missing_packages
from jaxsloth.foreign import ForeignError, check_writable_folder
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.spec import ModelSpec
from jaxsloth.recipe import Recipe, load_recipe, make_recipe
from jaxsloth.terminal import console
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.checkpoint import SavedRun, check_lora
from jaxsloth.training.fingerprints import check_fingerprints, check_kinds, fingerprints
from jaxsloth.training.fit import Callback, Fit, FitOptions, Progress
from jaxsloth.training.initialize import initial_adapters, with_adapters
from jaxsloth.training.lock import LOCK, check_free, lock
from jaxsloth.training.log import Entry
from jaxsloth.training.progress import ProgressBar
from jaxsloth.training.records import RECIPE, Bookkeeping, RunPlan, RunResult, output_folder, result_of
from jaxsloth.training.schedule import learning_rate

logger = logging.getLogger("jaxsloth.training")


class RunError(ForeignError):
    """A run that can't begin or go on as asked; nothing was written."""


def choose_backend(name: str) -> Backend:
    """The backend of that name; "auto" is the one that sees an accelerator, and JAX when both or neither do."""
    if name != "auto":
        return load_backend(name)
    installed = [backend for backend in BACKENDS if not missing_packages(backend)]
    if not installed:
        raise BackendUnavailableError("no backend is installed; run: pip install 'jaxsloth[torch]' or 'jaxsloth[jax]'")
    found = [load_backend(backend) for backend in installed]
    accelerated = [backend for backend in found if backend.devices().platform != "cpu"]
    return (accelerated or found)[-1]  # BACKENDS ends with jax


def choose_dtype(recipe: Recipe, devices: DeviceInfo) -> DtypeName:
    if recipe.dtype != "auto":
        return recipe.dtype
    return "float32" if devices.platform == "cpu" else "bfloat16"


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    resume_anyway: Collection[str] = (),
    stop_after: int | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    on_stage: Callable[[str], None] | None = None,
) -> RunResult:
    """Runs a recipe.

    Args:
        resume: go on from the output folder's newest whole checkpoint.
        resume_anyway: of "data", "base", "template", "recipe" and "files" (the checkpoint's own), what may have changed since
            that checkpoint was saved.
        stop_after: stop at this step (from 1; saved and evaluated), with the schedule of the whole run.
        on_stage: told where each save stands; see `checkpoints.save`.

    Raises:
        ValueError: (RunError, RecipeError, CheckpointError, DataError …) a user's mistake, found before anything is written.
    """
    if stop_after is not None and stop_after < 1:
        raise RunError(f"stop_after must be at least 1, got {stop_after}")
    opened = find_checkpoint(recipe.model)
    plan = make_plan(recipe, opened, resume=resume, resume_anyway=resume_anyway)
    model = build_model(plan, opened)
    return execute(plan, model, stop_after=stop_after, quiet=quiet, callbacks=callbacks, on_stage=on_stage)


def make_plan(recipe: Recipe, opened: Checkpoint, *, resume: bool = False, resume_anyway: Collection[str] = ()) -> RunPlan:
    """Checks a recipe against its checkpoint, data and output folder; reads no weights and writes nothing."""
    anyway = check_kinds(resume_anyway, "--resume-anyway")
    if anyway and not resume:
        raise RunError("--resume-anyway says what may have changed since a run that is resumed; give --resume too")
    saved = check_output(recipe, resume, anyway)
    spec, start = with_adapters(recipe, opened.spec())
    tokenizer = load_tokenizer(opened.path)
    train_examples, held_out = prepare(recipe.data, tokenizer, recipe.seed, spec.embedding.vocab)
    now = fingerprints(opened, tokenizer, recipe.data.template, train_examples, held_out)
    if saved is not None:
        check_lora(saved.folder, saved.config, spec)
        check_fingerprints(saved.folder, now, {"adapter": saved.adapter, "optimizer": saved.optimizer}, anyway)
    plan = plan_from_examples(recipe, spec, opened.name, train_examples, held_out, saved)
    return replace(plan, fingerprints=now, start=start, goes_on=resume)


def plan_from_examples(
    recipe: Recipe,
    spec: ModelSpec,
    base_model: str,
    examples: Sequence[Example],
    held_out: Sequence[Example] | None,
    saved: SavedRun | None = None,
) -> RunPlan:
    """A plan over data that is already tokens."""
    check_length(max((len(example.tokens) for example in examples), default=0), spec.max_positions)
    backend = choose_backend(recipe.backend)
    devices, data = backend.devices(), recipe.data
    step_batches = StepBatches(
        examples,
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        seed=recipe.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        max_length=data.max_length,
        pad_to_multiple_of=data.pad_to_multiple_of,
        devices=devices.count,
    )
    batches = []
    if held_out:
        size, multiple = recipe.evaluation.batch_size, data.pad_to_multiple_of
        batches = eval_batches(held_out, size, multiple, data.max_length, devices.count)
    total = recipe.steps or math.ceil((recipe.epochs or 1) * step_batches.steps_per_epoch)
    if saved is not None:
        check_values(saved.adapter, trainable_shapes(spec), f"{saved.folder}")
        if saved.state.step >= total:  # perhaps killed between its last checkpoint and its adapter: both are written again
            logger.warning("%s: all %d steps are done; only the adapter and the plot are written", saved.folder.parent, total)
    dtype = choose_dtype(recipe, devices)
    return RunPlan(recipe, backend, devices, dtype, spec, base_model, step_batches, batches, total, saved)


def check_output(recipe: Recipe, resume: bool, anyway: Collection[str] = ()) -> SavedRun | None:
    """That the output folder is free, or holds this run to be resumed; the checkpoint to go on from."""
    output = output_folder(recipe)
    check_writable_folder(output, "checkpoints.output", RunError)
    check_free(output)
    if not resume:
        _check_unused(output)
        return None
    if not _used(output):
        raise RunError(f"nothing to resume: {output} holds no run; start it without --resume")
    file = output / RECIPE
    if not file.is_file():
        raise RunError(f"{output} is not a run's folder: it has no {RECIPE}")
    _check_recipe(load_recipe(file), recipe, anyway)
    saved = checkpoints.latest(output)
    if saved is not None:
        _check_recipe(make_recipe(saved.state.recipe, f"{saved.folder / checkpoints.TRAINER_STATE}: recipe"), recipe, anyway)
    if saved is None:
        logger.warning("%s holds no whole checkpoint; the run starts from its beginning", output)
    return saved


def _used(output: Path) -> bool:
    return output.is_dir() and any(not entry.name.startswith((".tmp-", LOCK)) for entry in output.iterdir())


def _check_unused(output: Path) -> None:
    if _used(output):
        raise RunError(f"{output} holds another run; go on with --resume, or choose another checkpoints.output")


def _check_recipe(before: Recipe, recipe: Recipe, anyway: Collection[str]) -> None:
    changed = before.differences(recipe)
    if changed and "recipe" not in anyway:
        raise RunError(
            "the recipe has changed since the run began, and its curve would not be one run's:\n  "
            + "\n  ".join(changed)
            + "\nto go on all the same: --resume-anyway recipe"
        )


def build_model(plan: RunPlan, opened: Checkpoint) -> Model:
    """Builds the base on the backend and adds the adapters: the saved ones, the recipe's own, or fresh ones from the seed."""
    recipe = plan.recipe
    options = BuildOptions(plan.dtype, recipe.gradient_checkpointing, recipe.implementations or None, recipe.compute)
    model = plan.backend.build(replace(plan.spec, lora=None), opened.source, options)
    if plan.resume is not None:
        values = plan.resume.adapter
    elif plan.start is not None:
        values = plan.start
    else:
        values = initial_adapters(plan.spec, recipe.lora.init, recipe.seed, model.base_tensor)
    model.add_adapters(plan.spec, values)
    return model


def execute(
    plan: RunPlan,
    model: Model,
    *,
    stop_after: int | None = None,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    on_stage: Callable[[str], None] | None = None,
) -> RunResult:
    """Trains a built model by a plan. Only the first process writes; the others wait for it where it saves."""
    main = plan.devices.rank == 0
    plan.backend.barrier()  # the first process writes only once every other has looked at the output folder
    if not main:
        return _execute(plan, model, console(quiet=True), stop_after, callbacks, on_stage)
    with lock(plan.output):
        if not plan.goes_on:  # a run may have begun and ended since the plan was made
            _check_unused(plan.output)
        return _execute(plan, model, console(quiet=quiet), stop_after, callbacks, on_stage)


def _execute(
    plan: RunPlan,
    model: Model,
    shown: Console,
    stop_after: int | None,
    callbacks: Sequence[Callback],
    on_stage: Callable[[str], None] | None,
) -> RunResult:
    first = plan.resume.state.step if plan.resume is not None else 0
    last = min(plan.total_steps, stop_after or plan.total_steps)
    book = Bookkeeping(plan, model, plan.devices.rank == 0, on_stage)
    with ProgressBar(shown, plan.total_steps, first, last) as bar:
        fit = Fit(
            model,
            plan.step_batches,
            plan.held_out,
            _fit_options(plan, stop_after),
            book.save,
            [book, _Shown(bar), *callbacks],
            _progress(plan.resume),
        )
        progress = fit.run(plan.resume)
    plan.backend.synchronize()
    book.finish(progress)
    result = result_of(plan, progress, book.entries)
    shown.print(result.summary_table())
    return result


def _fit_options(plan: RunPlan, stop_after: int | None) -> FitOptions:
    recipe, optimizer = plan.recipe, plan.recipe.optimizer
    return FitOptions(
        total_steps=plan.total_steps,
        learning_rate=lambda step: learning_rate(step, plan.total_steps, optimizer.learning_rate, recipe.schedule),
        optimizer=OptimizerOptions(
            name=optimizer.name,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            loss_scaling=plan.dtype == "float16",
        ),
        seed=recipe.seed,
        log_every=recipe.log_every,
        evaluate_every=recipe.evaluation.every,
        save_every=recipe.checkpoints.every,
        save_best=recipe.checkpoints.best,
        stop_after=stop_after,
        read_late=plan.devices.platform != "cpu",
    )


def _progress(saved: SavedRun | None) -> Progress:
    if saved is None:
        return Progress()
    state = saved.state
    best = saved.folder.parent / f"checkpoint-{state.best_step}"
    reached = Progress(state.step, state.tokens, state.seconds, state.first_tokens, state.first_seconds)
    if not best.is_dir():  # the run did not keep its best until now; from here on it may
        return reached
    return replace(reached, best_step=state.best_step, best_loss=state.best_loss)


@dataclass(frozen=True)
class _Shown:
    """The progress bar as a callback."""

    bar: ProgressBar

    def on_log(self, entry: Entry) -> None:
        self.bar.on_log(entry)

    def on_evaluate(self, entry: Entry) -> None:
        self.bar.on_evaluate(entry)

    def on_save(self, step: int) -> None:
        del step
