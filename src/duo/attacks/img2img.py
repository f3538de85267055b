"""Image to image (SDEdit, Meng et al. 2021): an image of the concept, noised to part of the schedule, is denoised.

The attacker needs only the service's own image-to-image function, and one image of the concept. What the noise leaves
of it need not be erased from the model to come back. So at a low strength every model gives the image back, one that
never saw the concept too: the rate says something only beside that of such a model, strength by strength.

As published (arXiv 2506.08991) the concept is asked for too: `ask = "concept"`. But its words are what an erasure
waits for, and asking for nothing brings more back, so that is the default. `ask = "adversarial"` is near RECALL
(2026), which optimises the image itself; here the image is not changed.
"""

from __future__ import annotations

from dataclasses import dataclass

from duo.attacks._images import FromImages


@dataclass(frozen=True, kw_only=True)
class Img2img(FromImages):
    """Start from a noised image of the concept."""
