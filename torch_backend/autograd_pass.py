"""Hidden states and losses by autograd from the bodies' `forward`: the judge of the written pass, and the way of the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from jaxsloth.batch import IGNORE, Batch
from jaxsloth.objectives.objective import Objective, RowObjective
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.devices import to_device
from jaxsloth.torch_backend.objective import Tensors, weigh
from jaxsloth.torch_backend.run import DropoutKey, Run


def hidden(decoder: Decoder, input_ids: torch.Tensor, run: Run, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Final hidden states ``[batch, length, hidden]``, normed."""
    x = decoder.model.embed_tokens(input_ids, noise)
    for block in decoder.blocks:
        recompute = decoder.recompute and torch.is_grad_enabled()
        x = checkpoint(block, x, run, use_reentrant=False) if recompute else block(x, run)
    return decoder.model.norm(x)


def loss(
    decoder: Decoder,
    input_ids: torch.Tensor,
    run: Run,
    targets: torch.Tensor,
    target_positions: torch.Tensor,
    noise: torch.Tensor | None = None,
    per_token: bool = False,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross-entropy of the positions that have a target (indices into the flat batch), summed or each; float32."""
    states = hidden(decoder, input_ids, run, noise).flatten(0, 1).index_select(0, target_positions)
    targets = targets.flatten().index_select(0, target_positions)
    return decoder.lm_head.loss(states, targets, per_token, smoothing)


def run_of(decoder: Decoder, batch: Batch, rng_key: torch.Tensor | None = None) -> Run:
    """The settings of a pass over a batch of the host. rng_key: int64 ``[2]``, the step's key; None drops nothing."""
    device = decoder.device
    tables = decoder.rope_tables(to_device(batch.positions, device), int(batch.positions.max(initial=0)) + 1)
    dropout = None if rng_key is None else DropoutKey(rng_key, to_device(batch.rows, device))
    return Run(tables, to_device(batch.segments, device), dropout=dropout)


def losses(
    decoder: Decoder,
    batch: Batch,
    rng_key: torch.Tensor | None,
    noise: torch.Tensor | None = None,
    per_token: bool = True,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the cross-entropy of every target of the batch, or their sum, differentiable by everything that is trained; their
    positions, indices into the flat batch). noise: what is added to the embeddings, ``[batch, length, hidden]``."""
    device = decoder.device
    # Found on the host: asking the device would wait for it.
    positions = to_device(np.flatnonzero(batch.targets != IGNORE), device)
    run = run_of(decoder, batch, rng_key)
    ids, targets = to_device(batch.input_ids, device), to_device(batch.targets, device)
    return loss(decoder, ids, run, targets, positions, noise, per_token, smoothing), positions


def add_gradients(
    decoder: Decoder, batch: Batch, objective: Objective, rng_key: torch.Tensor | None, tensors: Tensors
) -> torch.Tensor:
    """The objective's result; its gradients are added to those of what is trained. Among the tensors may be "noise"."""
    by_row = isinstance(objective, RowObjective)
    found, positions = losses(decoder, batch, rng_key, tensors.get("noise"), by_row, objective.smoothing)
    if not by_row:
        (found * tensors["factor"]).backward()
        return found.detach()
    result, grads = weigh(objective, found.detach(), positions, batch.input_ids.shape, tensors)
    found.backward(grads)
    return result
