"""The objective of Direct Unlearning Optimization (DUO; Park et al. 2024) as pure tensor functions.

DUO reads "the safe twin is preferred to the unsafe image" through Diffusion-DPO (Wallace et al. 2024). With e_θ(x) the
policy's denoising error on image x, e_φ(x) that of the frozen reference and Δ(x) = e_θ(x) − e_φ(x), it minimises

    L = −log σ(−β·[Δ(safe) − Δ(unsafe)]) + λ·‖f_θ(x_T) − f_φ(x_T)‖²

Errors are means over a row's elements, as in the authors' code (the paper writes sums, so its β is smaller by the
number of elements). The sign between the two Δ is a minus; equation 4 of the workshop paper prints a plus, with which
both errors would fall.

`ipo_loss` and `kto_loss` are other forms of the preference. `erased_target` is what methods that erase by text share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Preference:
    """A preference over n rows, each field a scalar tensor; only `loss` carries a gradient.

    `accuracy` is the share of rows with a positive `margin`, which is Δ(unsafe) − Δ(safe), averaged and without β.
    """

    loss: Tensor
    accuracy: Tensor
    margin: Tensor


def squared_error(prediction: Tensor, target: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Mean squared error of each row, (n, …) → (n,), in float32 or wider; errors are first multiplied by `scale` (n,).

    With `Process.x0_scale` for `scale` it is the error of the clean image that a prediction implies: for rectified flow
    σ²·‖v − v_θ‖², which diffusers' training scripts call preconditioned outputs.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    mean = (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)
    return mean if scale is None else scale.to(mean).square() * mean


def duo_loss(
    *,
    policy_unsafe: Tensor,
    policy_safe: Tensor,
    reference_unsafe: Tensor,
    reference_safe: Tensor,
    beta: float,
    positive_penalty: float = 0.0,
) -> Preference:
    """The preference term, from denoising errors of shape (n,).

    `positive_penalty` is k of DPO-Positive (Pal et al. 2024): k·max(0, Δ(safe)) is added to the safe side inside the
    sigmoid, so that the model cannot win by denoising both images worse. At 0 the objective is DUO as published.
    """
    safe_rise = policy_safe - reference_safe
    unsafe_rise = policy_unsafe - reference_unsafe
    margin = unsafe_rise - safe_rise
    penalised = margin - positive_penalty * safe_rise.clamp(min=0)
    detached = margin.detach()
    return Preference(
        loss=-F.logsigmoid(beta * penalised).mean(),
        accuracy=(detached > 0).to(detached.dtype).mean(),
        margin=detached.mean(),
    )


def ipo_loss(
    *, policy_unsafe: Tensor, policy_safe: Tensor, reference_unsafe: Tensor, reference_safe: Tensor, beta: float
) -> Preference:
    """The same preference as a regression (IPO; Azar et al. 2024, eq. 17), from denoising errors of shape (n,).

    The margin is drawn to 1/(2β), and no further; the sigmoid of `duo_loss` always asks for more.
    """
    margin = (policy_unsafe - reference_unsafe) - (policy_safe - reference_safe)
    detached = margin.detach()
    return Preference(
        loss=(margin - 1 / (2 * beta)).square().mean(),
        accuracy=(detached > 0).to(detached.dtype).mean(),
        margin=detached.mean(),
    )


def kto_loss(
    *, policy_unsafe: Tensor, policy_safe: Tensor, reference_unsafe: Tensor, reference_safe: Tensor, beta: float
) -> Preference:
    """KTO (Ethayarajh et al. 2024, eq. 8): each image is good or bad by itself, and no pair is compared.

    With r = −Δ an image's reward, safe ones give 1 − σ(β·(r − z)) and unsafe ones 1 − σ(β·(z − r)). The reference
    point z is the batch's mean reward, from 0 and without gradient, where the paper has a KL divergence that it
    estimates from mismatched pairs: an image without a prompt has none.
    """
    safe, unsafe = reference_safe - policy_safe, reference_unsafe - policy_unsafe
    z = torch.cat([safe, unsafe]).detach().mean().clamp(min=0)
    detached = (safe - unsafe).detach()
    return Preference(
        loss=(torch.sigmoid(beta * (z - safe)) + torch.sigmoid(beta * (unsafe - z))).mean(),
        accuracy=(detached > 0).to(detached.dtype).mean(),
        margin=detached.mean(),
    )


def prior_loss(policy: Tensor, reference: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Mean squared difference of two predictions on the sampler's starting noise: (n, …) → scalar, at least float32.

    `scale` is as for `squared_error`.
    """
    return squared_error(policy, reference, scale=scale).mean()


def erased_target(base: Tensor, concept: Tensor, without: Tensor, *, eta: float) -> Tensor:
    """What the student is to predict: base − η·(concept − without), from predictions of the frozen model.

    In equation 8 of ESD (Gandikota et al. 2023) `base` is `without`, the unconditional one; in its attribute form that
    of c_from. SPM's (Lyu et al. 2024) is the same, with what is neutral for both.
    """
    return base - eta * (concept - without)
