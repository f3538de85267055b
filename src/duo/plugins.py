"""The records and protocols that leaves are written to, and how leaves are found. No torch at run time.

A leaf is one file in `families/`, `methods/`, `attacks/`, `judges/` or `metrics/`; its file name is its plugin name and
its class is the name in CamelCase. Other people's packages add leaves through entry points of the group `duo.<kind>`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from duo.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor, nn

    from duo.conditioning import Conditioning
    from duo.delta import Delta
    from duo.pairs import Pairs

DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("families", "methods", "attacks", "judges", "metrics")


# --- records ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled. The scheduler is the model folder's own unless `scheduler` names a diffusers class."""

    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}, expected at least 1")
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale is {self.guidance_scale}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a run does with memory and rounding. The defaults compute everything in float32, and nothing is moved.

    `dtype` is what the denoiser computes in, by autocast; its weights, the LoRA and the loss stay in `weights` and
    float32, and the prior term is computed without autocast. `weights` is what the frozen networks are held in.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass, not kept
    offload: bool = False  # VAE and text encoders wait on the CPU while the denoiser is trained
    optimizer_8bit: bool = False  # AdamW with moments of 8 bits, by bitsandbytes
    torch_compile: bool = False  # the denoiser, by torch.compile
    shard: bool = False  # of several processes each holds a part of the frozen denoiser while it is trained (FSDP)

    def __post_init__(self) -> None:
        for name in ("dtype", "weights"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(DTYPES)}")
        if self.weights != "float32" and self.dtype not in ("float32", self.weights):
            raise ValueError(
                f"dtype is {self.dtype!r} but weights are {self.weights!r}; give both the same, or leave one"
            )
        if self.shard and self.torch_compile:
            raise ValueError("shard and torch_compile do not go together; leave one")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge saw in one image: `label` is "absent", "present" or "corrupted"; `scores` are its raw outputs.

    `record` is what else it saw, as JSON holds it (a detector's boxes), so that other labels and thresholds can be
    applied later without judging again.
    """

    label: str
    scores: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try of an attack at bringing the concept back. The harness renders it and the judge decides.

    `tokens` maps placeholder words of `prompt` to learned embeddings of shape (vectors, width). `variant` names the
    setting of the attack that this is a try of (a restart, a strength, a number of steps): rates are told apart by it.

    With `init` an image is edited at `strength` (SDEdit), and with a `mask` as well only where that is white.
    `latents` (channels, height, width) stand in for the noise that the seed would draw. `weights` is the name of a
    delta that `prepare` wrote to its run's folder, `<weights>.safetensors`, which is attached over the model under
    attack; `unloaded` asks for that model after its adapter was dropped. `source` is an image that the rendered one
    would be, were the attack to succeed wholly: how near it came is told.
    """

    prompt: str
    negative_prompt: str | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    variant: str = ""
    init: Image | None = None
    mask: Image | None = None
    strength: float | None = None
    latents: Tensor | None = None
    weights: str | None = None
    unloaded: bool = False
    source: Image | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.init is None) != (self.strength is None):
            raise ValueError("init and strength go together; give both, or neither")
        if self.mask is not None and self.init is None:
            raise ValueError("mask says what of init is drawn anew; give init too")
        if self.latents is not None and self.init is not None:
            raise ValueError("latents are where an image starts from nothing; give them, or init")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a text encoder's reading of a prompt lies in a row of `Conditioning.embeds`.

    Its words are at `first` up to before `end`, which is `first` where there are none. There its end token stands, and
    then padding up to before `stop`. `start` is where its start token stands; None of an encoder without one (T5).
    """

    start: int | None
    first: int
    end: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class KohyaLayer:
    """Where kohya's LoRA files keep a layer of a denoiser: in `module`, which stacks the outputs of several layers.

    The layer is number `part` of them; `widths` are theirs, relative to each other. Most modules hold one layer.
    """

    module: str
    part: int = 0
    widths: tuple[int, ...] = (1,)


class Access(IntEnum):
    """What an attacker may touch. Each level includes those below it."""

    QUERY = 0  # prompts in, images out
    TEXT = 1  # and the text encoder's forward pass
    GRADIENT = 2  # and every network's gradients, weights held
    WEIGHTS = 3  # and the weights themselves


# --- protocols ------------------------------------------------------------------------------------


class Process(Protocol):
    """The forward process that a denoiser was trained on. `t` is what `Family.predict` takes, shape (n,)."""

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Draw `n` times uniformly between the fractions `low` (clean, 0) and `high` (pure noise, 1)."""

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def implied(self, x_t: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean image and the noise, (x0, eps), that the denoiser's output at x_t stands for."""

    def times(self, fractions: Tensor) -> Tensor:
        """The times at fractions of the schedule, (n,): 0 clean, 1 where a sampler starts."""

    def terminal(self, eps: Tensor, *, at: float = 1.0) -> tuple[Tensor, Tensor]:
        """Pure noise at the noisiest time of the schedule, with that time: (x_T, t) of shapes (n, …) and (n,).

        `at` gives it the time of another fraction of the schedule.
        """

    def x0_scale(self, t: Tensor) -> Tensor:
        """How large an error of 1 in the prediction is in the clean image that it implies: (n,), float32."""


class Family(Protocol):
    """One kind of model: everything that methods and attacks need of it, and the only code that knows diffusers."""

    pipelines: ClassVar[frozenset[str]]  # diffusers `_class_name`s that it serves
    component: ClassVar[str]  # the denoiser's name in these pipelines: "unet" or "transformer"
    name: str  # what the user called the model: "toybox", a folder, a hub id
    device: torch.device
    denoiser: nn.Module
    process: Process

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent at the model's own image size."""

    def check(self, sampling: Sampling, *, size: tuple[int, int] | None = None) -> None:
        """Raise `UserError` where images cannot be sampled so, or where the denoiser cannot take images of `size`
        (width, height). Nothing is drawn."""

    def sampler(self, sampling: Sampling) -> str:
        """The name of the sampler that images are drawn with, for the record: diffusers' class."""

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts. Differentiable in `tokens` (placeholder word → embedding (vectors, width))."""

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt."""

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode, scaled as the denoiser expects; the posterior's mean where `generator` is None."""

    def images(self, latents: Tensor) -> list[Image]:
        """VAE-decode, the inverse of `latents`: the nearest to an image that the model can come."""

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's output (ε, v or flow velocity, as `process.target`)."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        latents: Tensor | None = None,
    ) -> list[Image]:
        """One image a prompt; image i depends on seeds[i] alone (a CPU generator each).

        `latents` (n, *latent_shape) are what the seeds would draw: unit normal noise, in the denoiser's layout.
        """

    def edit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        *,
        strength: float,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        masks: Sequence[Image] | None = None,
    ) -> list[Image]:
        """SDEdit (Meng et al. 2021): noise each image to `strength` of the schedule and denoise it with its prompt.

        With `masks` (mode "L", of the images' sizes) that is inpainting: what is black stays as it is.
        """

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """The denoiser's Linear and Conv2d modules of one scope, by name: "self_attention", "cross_attention",
        "attention", "feed_forward", "convolutions", "text_inputs" (what the text enters by), "transformers", "all"."""

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders: what waits on the CPU while the denoiser is trained (`Precision.offload`)."""

    def spans(self, prompt: str) -> list[Span]:
        """Where the prompt's words lie along its `text`: one for each of the encoders that follow one another there."""

    # What text attacks need (Access.TEXT and above).
    def token_embeddings(self) -> Tensor:
        """The text encoder's table, (vocabulary, width), detached."""

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, length, width) of full id rows (n, length), special tokens included."""

    def tokenizer(self) -> Any:
        """The (first) transformers tokenizer."""

    def word_parts(self) -> dict[str, int]:
        """The parts of a learned word in a textual-inversion file for this pipeline, with their widths, in the order of
        `token_embeddings`' columns; "" names the only part. Empty where diffusers loads no such file into it."""

    # What other software needs.
    def save(self, folder: Path) -> None:
        """Write the whole pipeline in the diffusers folder layout, safetensors only."""

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the denoiser whose config is given; None where they cannot."""


@runtime_checkable
class Method(Protocol):
    """A frozen keyword-only dataclass: its fields are its configuration, its flags and its manifest.

    It may also have `check(model, *, pairs: int | None, precision: Precision)`, which raises `UserError` for settings
    that do not fit the model, the number of pairs (None: not known) or this machine. It is called as soon as the model
    is loaded, before pairs are made and before anything is written. One that can train with the frozen denoiser cut
    into shares (`duo.precision.sharded`) has `shards = True`; `Precision.shard` is refused for the others. `strength`
    names the field, a number above 0, by which more is erased and less kept the larger it is: a search for the strength
    (`duo.strength`) varies it where the user names no other. The images that the method draws for itself (`duo.drawn`)
    may not depend on it, for the runs of such a search share them.
    """

    takes_pairs: ClassVar[bool]  # whether it learns from pairs of images; a run makes them only then

    def erase(self, model: Family, concept: Any, *, pairs: Pairs | None, run: Run) -> Delta:
        """Make the model unable to draw the concept. `pairs` is None exactly where `takes_pairs` is false."""


@runtime_checkable
class Attack(Protocol):
    """A frozen keyword-only dataclass. It yields attempts and never grades itself.

    It may also have `queries`, the most images that a search may ask of the target for one prompt (0 where it has
    none); `uses_undefended = True`, for an attacker who has the model from before the erasure too
    (`Target.undefended`); `found_by`, the row of another attack, to be given `AttackConcept.found_prompts`; and
    `learns_from_images = True`, to be given `AttackConcept.attack_images`. Where it makes no
    sense on a kind of model, `prepare` raises `duo.errors.NotDefinedError` with the reason in one line.
    """

    access: ClassVar[Access]

    def prepare(self, target: Any, concept: Any, *, run: Run) -> dict[str, Tensor]:
        """Once per target: learn a token, a concept vector, … The stage saves it and hands it to `search`.

        Weights that attempts name (`Attempt.weights`) are written to the run's folder here.
        """

    def search(
        self, target: Any, state: Mapping[str, Tensor], prompt: str, *, generator: torch.Generator
    ) -> Iterator[Attempt]:
        """Attempts for one prompt, in the order to be tried. The images of a row are shared out over them."""


@runtime_checkable
class Judge(Protocol):
    """Images in, verdicts out. `digest` names the weights that judged (and settings that have defaults, if any).

    A judge may have a `network`, which names the network alone: judge and curator are noted where they share one.
    """

    digest: str

    def __call__(self, images: Sequence[Image]) -> list[Verdict]: ...


class Metric(Protocol):
    """Accumulates over batches. `compute` gives one value per image, so that intervals can be made from them.

    It is made without arguments, or is a dataclass whose fields a recipe may set (`score.metrics.<name>`). It may also
    have `check()`, which raises `UserError` where a network of its is missing, and reads no weights: it is called
    before anything is made; and `protocol()`, a dict that names what looks at the images and how they are prepared:
    `network`, `digest` and `resolution`. One that compares images with prompts alone has `needs_references = False`.
    """

    name: ClassVar[str]  # as printed, with the network in it: "1 - toybox-LPIPS"
    higher_is_better: ClassVar[bool]

    def update(
        self, *, images: Sequence[Image], references: Sequence[Image] | None, prompts: Sequence[str]
    ) -> None: ...

    def compute(self) -> Sequence[float]: ...


class SetMetric(Protocol):
    """One number for a whole set of images, against a set of references of the same number: FID, KID.

    No image has a value of its own, so what a `Metric` gives cannot be asked of it. Features are made once an image,
    and `compute` is called again on subsets of them for an interval. It is made as a `Metric` is, and may have
    `check()` too. Metrics of one `digest` share their features.
    """

    name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    @property
    def digest(self) -> str:
        """Of the network that makes the features."""

    def protocol(self) -> dict[str, Any]:
        """What looks at the images and how they are prepared: `network`, `digest` and `resolution`."""

    def features(self, images: Sequence[Image]) -> NDArray[np.float64]:
        """(n, width), a row an image; what other images are given beside it changes nothing."""

    def compute(self, features: NDArray[np.float64], references: NDArray[np.float64]) -> float:
        """The number for two sets of features, (n, width) each. Raises ValueError where they are not as many."""


class Run(Protocol):
    """What a stage lends to a leaf: a folder of its own to keep checkpoints in, a seed, and a way to tell progress."""

    folder: Path
    seed: int
    device: torch.device
    precision: Precision
    sampling: Sampling  # how the run samples images, for methods that draw their own

    def progress(self, total: int, label: str) -> AbstractContextManager[Any]:
        """A bar with `.update(step, **numbers)`; plain lines where there is no terminal."""

    def log(self, **numbers: float | int | str) -> None:
        """One row of the stage's `log.jsonl`."""


# --- discovery ------------------------------------------------------------------------------------


def names(kind: str) -> list[str]:
    """The leaves of a kind, by listing its folder and the entry points; nothing is imported."""
    if kind not in KINDS:
        raise ValueError(f"no such kind of plugin: {kind}")
    folder = Path(__file__).parent / kind
    own = {module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_")}
    return sorted(own | {point.name for point in _points(entry_points, kind)})


def load(kind: str, name: str) -> type:
    """Import the leaf `name` of `kind` and return its class."""
    if name not in names(kind):
        singular = {"families": "family"}.get(kind, kind.removesuffix("s"))
        raise UserError(f"no {singular} is called {name!r}{did_you_mean(name, names(kind))}")
    for point in _points(entry_points, kind):
        if point.name == name:
            return point.load()  # type: ignore[no-any-return]
    module = importlib.import_module(f"duo.{kind}.{name}")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))  # type: ignore[no-any-return]


@lru_cache
def _points(find: Callable[..., Iterable[EntryPoint]], kind: str) -> tuple[EntryPoint, ...]:
    """The entry points of a kind. Finding them reads every installed package, and a recipe asks dozens of times."""
    return tuple(find(group=f"duo.{kind}"))
