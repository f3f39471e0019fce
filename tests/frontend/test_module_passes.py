"""The fused training passes behind the torch module, asked for by name, against the composed ones and transformers + PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.jax_backend import functional_model as jax_functional
from jaxsloth.jax_backend import written_pass as jax_written
from jaxsloth.models.memory import FILLED, activation_bytes
from jaxsloth.torch_backend import written_program
from jaxsloth.torch_backend.written_pass import WrittenPass
from tests.support.modules import BACKENDS, adapted, batch, our_base, their_base

BAR = 1e-5
OPTIONS = {name: BuildOptions(implementations={"train_pass": name}) for name in ("fused", "composed")}
TARGETS = ["q_proj", "v_proj", "layers.1.self_attn.k_proj", "o_proj", "up_proj", "down_proj"]


def model(backend: str, train_pass: str, nested: bool | None = None, **changes: Any) -> Any:
    return adapted(our_base(backend, options=OPTIONS[train_pass], nested=nested), **({"target_modules": TARGETS} | changes))


def rows(kind: str) -> dict[str, torch.Tensor]:
    if kind != "packed":
        found = batch(left=kind == "left")
        # The padding before a row would have to predict its first token.
        found["labels"].masked_fill_(found["attention_mask"].cumsum(-1) == 1, -100)
        return found | {"position_ids": (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    ids = batch((40,))["input_ids"]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def gradients(of: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.requires_grad}
    of.zero_grad()
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        assert value.norm() > 0
        torch.testing.assert_close(ours[name], value, rtol=0, atol=BAR * float(value.abs().max()), msg=name)


@pytest.fixture
def fused_modes(monkeypatch) -> Iterator[list[str | None]]:
    """The `gradient_checkpointing` of every fused forward that is run (torch) or traced (JAX)."""
    seen: list[str | None] = []
    of_torch, of_jax = WrittenPass._forward, jax_written.stream

    def torch_forward(self: Any, rows: Any, mode: str | None) -> Any:
        seen.append(mode)
        return of_torch(self, rows, mode)

    def jax_stream(layers: Any, x: Any, run: Any, count: int, mode: str, *others: Any) -> Any:
        seen.append(mode)
        return of_jax(layers, x, run, count, mode, *others)

    monkeypatch.setattr(WrittenPass, "_forward", torch_forward)
    monkeypatch.setattr(jax_written, "stream", jax_stream)
    return iter([seen])


# JAX compiles some forty programs a case: of the padded ones the quantized is enough for the fast core.
@pytest.mark.parametrize(
    ("kind", "nested", "backend"),
    [
        pytest.param(kind, nested, backend, marks=[pytest.mark.slow] if (kind, backend) == ("right", "jax") else [])
        for kind, nested in (("right", None), ("left", True), ("packed", None))
        for backend in BACKENDS
    ],
)
def test_loss_hidden_and_logits_are_those_of_the_composed_ops(kind, nested, backend, fused_modes):
    """Gradients of each, and several forwards before their backwards, in another order and with other cotangents."""
    modes = next(fused_modes)
    ours, theirs = model(backend, "fused", nested), model(backend, "composed", nested)
    given = rows(kind)
    loss, judge = ours(**given).loss, theirs(**given).loss
    assert modes == ["none"]
    assert abs(float(loss.detach() - judge.detach())) < BAR
    loss.backward()
    judge.backward()
    assert_close(gradients(ours), gradients(theirs))
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    others = {"input_ids": given["input_ids"].flip(0), "labels": given["labels"].flip(0)}
    if kind == "packed":  # other tokens of the same documents
        ids = given["input_ids"].flip(1)
        others = given | {"input_ids": ids, "labels": ids.masked_fill(given["labels"] == -100, -100)}
    inputs = {name: value for name, value in given.items() if name != "labels"}

    # Packed on JAX, six programs less: the head behind states that are compared already.
    headless = (kind, backend) == ("packed", "jax")

    def whole(values: torch.Tensor) -> torch.Tensor:
        """A sum over the square root of how many there are: thousands that cancel leave their rounding in a plain sum."""
        return values.sum() / values.numel() ** 0.5

    def several(of: Any) -> torch.Tensor:
        first, second = of(**given).loss, of(**others).loss
        states = of.get_base_model().model(**inputs).last_hidden_state[real]
        if headless:
            (3 * second).backward()
            states.square().mean().backward()
            first.backward()
            return torch.stack([first, second, whole(states)]).detach()
        policy = of(**inputs).logits[real]
        with of.disable_adapter(), torch.no_grad():  # as DPO's reference comes between forward and backward
            base = of(**inputs).logits[real]
        scored = (policy - base).square().mean()
        (3 * second).backward()
        states.square().mean().backward()
        first.backward()
        scored.backward()
        return torch.stack([first, second, whole(states), scored, whole(base)]).detach()

    torch.testing.assert_close(several(ours), several(theirs), rtol=BAR, atol=BAR)
    assert_close(gradients(ours), gradients(theirs))
    assert len(modes) >= (2 if headless else 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_fused_passes_cannot_do_goes_to_the_composed_ones_or_is_refused(backend, fused_modes):
    modes = next(fused_modes)
    ours, theirs = model(backend, "fused"), adapted(their_base(), target_modules=TARGETS)
    given = batch()
    given["labels"] = given["input_ids"]  # padding is scored
    with_hole = batch()
    with_hole["attention_mask"][:, 9] = 0
    with_hole["labels"][:, 9] = -100
    for one in (given, with_hole):
        with torch.no_grad():
            assert abs(float(ours(**one).loss - theirs(**one).loss)) < BAR
        loss, judge = ours(**one).loss, theirs(**one).loss
        assert abs(float(loss.detach() - judge.detach())) < BAR
        loss.backward()
        judge.backward()
        assert_close(gradients(ours), gradients(theirs))
    assert not modes


@pytest.mark.parametrize(
    ("backend", "output", "changes"),
    [
        ("torch", "loss", {}),
        ("torch", "logits", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("torch", "logits", {"bias": "all"}),
        ("jax", "loss", {}),
    ],
)
def test_dropout_biases_and_whole_modules_take_the_written_pass(backend, output, changes, fused_modes):
    """Its masks are those of the bodies' own forwards, and an evaluation between two steps drops nothing."""
    modes = next(fused_modes)
    found = []
    for train_pass in ("fused", "composed"):
        base = our_base(backend, options=OPTIONS[train_pass], attention_bias="bias" in changes)
        of = adapted(base, target_modules=TARGETS, lora_dropout=0.3, **changes)
        values = []
        for place in range(2):
            torch.manual_seed(place)  # the masks' key is drawn from it
            given = batch()
            result = of.train()(**given)
            value = result.loss if output == "loss" else result.logits[given["attention_mask"].bool()].square().mean()
            value.backward()
            with torch.no_grad():
                values += [value.detach(), of.eval()(**given).loss]
        found.append((torch.stack(values), gradients(of)))
    (ours, grads), (theirs, judged) = found
    assert len(modes) >= (4 if backend == "torch" else 2) and len(set(theirs.tolist())) == 3
    assert backend == "jax" or modes.count(None) == 2
    torch.testing.assert_close(ours, theirs, rtol=BAR, atol=BAR)
    assert_close(grads, judged)


@pytest.mark.parametrize(
    ("backend", "asked", "switched_on", "mode"),
    [
        ("torch", "none", False, "none"),
        ("torch", "none", True, "full"),
        ("torch", "selective", True, "selective"),
        ("torch", "full", False, "none"),
        ("torch", "offload", True, "offload"),
        ("torch", "auto", True, "none"),
        ("jax", "none", True, "full"),
        ("jax", "selective", True, "selective"),
    ],
)
def test_the_checkpointing_asked_for_reaches_the_pass(backend, asked, switched_on, mode, fused_modes):
    modes = next(fused_modes)
    options = BuildOptions(gradient_checkpointing=asked, implementations={"train_pass": "fused"})
    ours, theirs = adapted(our_base(backend, options=options)).train(), adapted(their_base())
    ours.get_base_model().model.gradient_checkpointing = switched_on
    ours(**batch()).loss.backward()
    assert modes == [mode]
    theirs(**batch()).loss.backward()
    assert_close(gradients(ours), gradients(theirs))


def test_auto_chooses_again_while_a_forward_waits_for_its_backward(monkeypatch, fused_modes):
    modes = next(fused_modes)
    options = BuildOptions(gradient_checkpointing="auto", implementations={"train_pass": "fused"})
    ours, theirs = adapted(our_base("torch", options=options)).train(), adapted(their_base())
    ours.get_base_model().model.gradient_checkpointing = True
    need = activation_bytes(ours.get_base_model().engine.model.spec, "none", 64, 4)
    monkeypatch.setattr(written_program, "free_memory", lambda device: need / FILLED + 1)
    for of in (ours, theirs):
        with torch.no_grad():
            of(**batch())
        waiting = of.get_base_model().model(batch((60,))["input_ids"]).last_hidden_state.square().mean()
        of(**batch((70, 60))).loss.backward()
        waiting.backward()
    assert modes == [None, "none", "offload"]
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize(("mode", "loop"), [("none", "unrolled"), ("full", "scan")])
def test_what_is_kept_between_jaxs_programs_holds_no_base_weight(mode, loop, monkeypatch):
    kept: list[Any] = []
    pull = jax_functional._pull

    def watched(residuals: Any, *others: Any) -> Any:
        kept.extend(residuals.kept)
        return pull(residuals, *others)

    monkeypatch.setattr(jax_functional, "_pull", watched)
    options = BuildOptions(gradient_checkpointing=mode, implementations={"train_pass": "fused", "layer_loop": loop})
    ours = adapted(our_base("jax", options=options), r=3).train()
    ours.get_base_model().model.gradient_checkpointing = mode != "none"
    ids = batch((70,))["input_ids"]  # 96 with the padding: no weight is as high
    ours.get_base_model().model(ids).last_hidden_state.sum().backward()
    matrices = {np.shape(leaf)[-2:] for leaf in jax.tree.leaves(ours.get_base_model().engine.model.frozen) if np.ndim(leaf) > 2}
    assert kept and matrices == {(32, 64), (64, 64), (64, 128), (128, 64)}
    assert not {np.shape(leaf)[-2:] for leaf in kept if np.ndim(leaf) > 1} & {*matrices, (260, 64)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_parameters_own(backend):
    """Writing one in place, as clipping does, changes no other, and neither does a second pass."""
    ours = model(backend, "fused", r=4, rank_pattern={"layers.1.mlp.down_proj": 2})
    ours(**batch()).loss.backward()
    found = gradients(ours)
    loss = ours(**batch()).loss
    loss.backward(retain_graph=True)
    for p in (p for p in ours.parameters() if p.requires_grad):
        p.grad.mul_(2)
    loss.backward()
    assert_close(gradients(ours), {name: 3 * value for name, value in found.items()})


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_scalings_that_differ_by_layer(backend, fused_modes):
    modes = next(fused_modes)
    changes = {"r": 32, "rank_pattern": {"q_proj": 64, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 3}}
    ours, theirs = model(backend, "fused", **changes), adapted(their_base(), target_modules=TARGETS, **changes)
    for one in (ours, theirs):
        one(**batch()).loss.backward()
    assert modes == ["none"]
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["none", "selective", "offload", "full", "auto"])
def test_steps_on_a_gpu_are_those_of_peft(backend, mode):
    """Without being asked for, the fused pass runs; on torch from the third step on replayed from a CUDA graph."""
    wide = {"hidden_size": 256, "intermediate_size": 448, "head_dim": 64}
    options = BuildOptions(gradient_checkpointing=mode)
    ours = adapted(our_base(backend, options=options, **wide)).train()
    ours.get_base_model().model.gradient_checkpointing = mode != "none"
    theirs = adapted(our_base("torch", options=OPTIONS["composed"], **wide)).train()

    def losses(of: Any) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in of.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for place in range(8):
            given = {name: value.cuda().roll(place, 0) for name, value in batch().items()}
            loss = of(**given).loss
            hidden = of.get_base_model().model(given["input_ids"], given["attention_mask"]).last_hidden_state
            (loss + hidden[given["attention_mask"].bool()].square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(ours) == pytest.approx(losses(theirs), abs=2e-4)
