"""Numbers that no law is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibrate.run.errors import UserError


def refuse_broken(logits: torch.Tensor, model: str, prompt_ids: Sequence[str], step: int) -> None:
    """Stop at logits that hold NaN or plus infinity, or nothing but minus infinity.

    Single ones of minus infinity are tokens that are never drawn, and pass: it is the largest of a
    row that says it.

    Parameters
    ----------
    logits : tensor (B, V)
    model : str
        Which, for the message.
    prompt_ids : sequence of str
        Of each row.
    step : int
        Token of the answer, from 0.

    Raises
    ------
    UserError
        With prompt, step and model.
    """
    broken = ~torch.isfinite(logits.amax(-1))
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise UserError(
            f"the {model} gave NaN or infinite logits for prompt {prompt_ids[row]!r} at step "
            f"{step}: nothing after it can be believed; try --dtype float32, or another model"
        )
