"""The model that a memory starts from: a causal LM as it is, or cut to fewer blocks and mended.

Cutting blocks out of a trained model leaves a gap: the block after it (or the final norm) gets hidden states unlike any
it was trained on, and the model is useless until thousands of steps have mended it. Most of that is mended at once, in
closed form. Let O be what the last block before a gap puts out in the cut model, Y what the whole model has at the far
side of the gap, and A the input of that block's last linear map W (the MLP's down projection, which adds A·Wᵀ to O).
Over some calibration text

    ΔW = argmin Σ_r w_r·‖Y_r − O_r − A_r·ΔWᵀ‖² + λ‖ΔW‖²,   w_r = 1 / mean(Y_r²)

is a ridge regression: one Gram matrix, one solve. The weights w_r make every position count alike, because the next
norm divides by their size; without them the first token's huge hidden states take all. ΔW is kept only if it lowers the
error on calibration text that it was not fitted on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.modeling.scoring import load_causal_lm
from memdec.modeling.structure import blocks, text_config, trunk

LOGGER = logging.getLogger(__name__)

RIDGE = 0.03  # λ over the mean of the Gram matrix's diagonal
HELD_BACK = 8  # every eighth calibration window judges the fit


def initialise(
    init: str | os.PathLike[str] | nn.Module,
    *,
    layers: int | None = None,
    calibration: Tensor | None = None,  # (T,) int token ids
    context: int = 1024,
    device: torch.device | str | None = None,
) -> Any:
    """The start of a memory: `init` whole in float32, or cut to `layers` blocks and mended on the calibration text.

    Args:
        init: causal LM: folder, hub id, ``.gguf`` file, or a loaded model (which a cut changes).
        layers: blocks to keep; None, or as many as there are, keeps all.
        calibration: text to mend the cut on, some thousand tokens; None leaves the cut as it is.
        context: tokens in a window of the calibration text.
        device: where the model goes; None is the CPU.

    Raises:
        MemdecError: the model has fewer blocks than `layers`, or cannot be loaded.
    """
    # Float32 for the cut too: added to bfloat16 weights, half of the mending would be rounded away.
    model = load_causal_lm(init, dtype=torch.float32, device=device)
    total = len(blocks(model)[1])
    if layers is None or layers == total:
        return model
    keep = choose_blocks(total, layers)
    windows = [] if calibration is None else calibration_windows(calibration, context)
    places = changed_places(keep, total) if windows else []
    hidden = hidden_states(model, windows, [after(keep, place, total) for place in places])
    cut_blocks(model, keep)
    LOGGER.info("keeping %d of %d blocks: %s", layers, total, keep)
    for place in places:
        mend(model, place, windows, hidden[after(keep, place, total)])
    return model


def choose_blocks(total: int, layers: int) -> list[int]:
    """Which blocks a memory of `layers` blocks keeps, by number: the first, and the last two (one of two or three).

    The first blocks build what the others work on, the last turn it into predictions; in between each block changes its
    input little.
    """
    if not 1 <= layers <= total:
        raise MemdecError(f"layers is {layers}; the model has {total} blocks, so wanted 1 to {total}.")
    last = min(2, layers // 2)
    return [*range(layers - last), *range(total - last, total)]


def changed_places(keep: list[int], total: int) -> list[int]:
    """The places in `keep` from the first block after which blocks are missing: from there on the cut model differs."""
    return [place for place in range(len(keep)) if after(keep, place, total) != place + 1]


def after(keep: list[int], place: int, total: int) -> int:
    """The number of the block that follows the one at `place` in the cut model; `total` stands for the final norm."""
    return keep[place + 1] if place + 1 < len(keep) else total


def calibration_windows(tokens: Tensor, context: int) -> list[Tensor]:
    """The text in windows of at most `context` tokens, each int64 (1, L), none shorter than half of that."""
    length = min(context, 512)  # enough for hidden states like any other, and quick
    pieces = [piece.long()[None] for piece in torch.split(tokens, length)]
    return [piece for piece in pieces if piece.shape[1] > length // 2] or pieces[:1]


def cut_blocks(model: Any, keep: list[int]) -> None:
    """Drop all blocks of `model` but those in `keep`, and make configuration and numbering agree."""
    name, found = blocks(model)
    total = len(found)
    kept = nn.ModuleList([found[index] for index in keep])
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, kept)
    for place, block in enumerate(kept):
        # The cache is indexed by these numbers: a block that kept its old one would write past the cache's end.
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
    config = text_config(model)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:  # one entry a block: layer_types and its like
            setattr(config, key, [value[index] for index in keep])
    config.num_hidden_layers = len(keep)


@torch.no_grad()
def hidden_states(model: nn.Module, windows: list[Tensor], wanted: list[int]) -> dict[int, list[Tensor]]:
    """What goes into each of the blocks `wanted` (number of blocks: out of the last), a tensor (L, d) a window."""
    _, found = blocks(model)
    states: dict[int, list[Tensor]] = {number: [] for number in wanted}
    with ExitStack() as stack:
        for number in wanted:
            # the output of one block is the input of the next
            stack.enter_context(watched(found[number - 1], states[number]))
        for window in windows:
            run_trunk(model, window)
    return states


@contextmanager
def watched(block: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Collect the block's outputs, flattened to (L, d), while the context lasts."""

    def keep_output(module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.reshape(-1, hidden.shape[-1]).clone())

    handle = block.register_forward_hook(keep_output)
    try:
        yield
    finally:
        handle.remove()


def run_trunk(model: nn.Module, window: Tensor) -> None:
    """Run the model without its head on one window."""
    body = trunk(model)
    body(input_ids=window.to(next(body.parameters()).device), use_cache=False)


@torch.no_grad()
def mend(model: nn.Module, place: int, windows: list[Tensor], targets: list[Tensor]) -> bool:
    """Fit the last linear map of the block at `place` so that the block puts out `targets`; whether that helped."""
    block = blocks(model)[1][place]
    linear = last_linear(block, int(text_config(model).hidden_size))
    if linear is None:
        LOGGER.warning("block %d has no last linear map to mend the cut with; it stays as it was cut", place)
        return False
    gram: Tensor | None = None
    cross: Tensor | None = None

    def pairs(judging: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(A, Y − O, w) of one window after another; an eighth of them judges, the others are fitted."""
        for number, (window, target) in enumerate(zip(windows, targets, strict=True)):
            if len(windows) > 1 and (number % HELD_BACK == HELD_BACK - 1 or number == len(windows) - 1) != judging:
                continue
            inputs: list[Tensor] = []
            outputs: list[Tensor] = []
            handle = linear.register_forward_pre_hook(lambda module, given, into=inputs: into.append(given[0]))
            try:
                with watched(block, outputs):
                    run_trunk(model, window)
            finally:
                handle.remove()
            features = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            wanted = target.float()
            yield features, wanted - outputs[0].float(), 1 / wanted.pow(2).mean(1, keepdim=True).clamp_min(1e-12)

    def error(judging: bool) -> float:
        return sum(float((weight * rest.pow(2)).sum()) for _, rest, weight in pairs(judging))

    before = 0.0
    for features, rest, weight in pairs(judging=False):
        if features.shape[0] != rest.shape[0]:
            return False  # a mixture of experts gives each of its maps only some of the positions
        gram = weighted(features, weight, features) + (0 if gram is None else gram)
        cross = weighted(features, weight, rest) + (0 if cross is None else cross)
    if gram is None or cross is None:
        return False
    before = error(judging=True)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-12)
    change = torch.linalg.solve(gram.double(), cross.double())  # (features, d)
    weight_matrix = cast(Tensor, linear.weight)
    old = weight_matrix.detach().clone()
    transposed = isinstance(linear, nn.Linear)  # transformers' Conv1D keeps its weight as (in, out)
    weight_matrix.add_((change.T if transposed else change).to(old))
    now = error(judging=True)
    LOGGER.info("mended the cut after block %d: error %.4g, was %.4g", place, now, before)
    if not now < before:
        weight_matrix.copy_(old)
        return False
    return True


def weighted(left: Tensor, weight: Tensor, right: Tensor) -> Tensor:
    """leftᵀ · diag(weight) · right."""
    return left.T @ (weight * right)


def last_linear(block: nn.Module, hidden_size: int) -> nn.Module | None:
    """The linear map that a block runs last onto the hidden width: the MLP's down projection."""
    matching = [
        module
        for module in block.modules()
        if not any(True for _ in module.children())
        and isinstance(getattr(module, "weight", None), Tensor)
        and cast(Tensor, module.weight).ndim == 2
        and output_width(module) == hidden_size
    ]
    return matching[-1] if matching else None


def output_width(linear: nn.Module) -> int:
    """Output width of a linear layer: rows of its weight, or columns for transformers' Conv1D."""
    weight = cast(Tensor, linear.weight)
    return int(weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1])
