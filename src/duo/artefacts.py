"""An erasure as other software leaves it, or ours, to be audited: what a path or hub id holds, and the model it makes.

    delta           ours: a run folder, or a delta.safetensors
    lora            a LoRA .safetensors in the naming of diffusers or of kohya, with or without text encoders
    denoiser        a part of a denoiser's weights, or all: a .safetensors, or a folder of diffusers' `save_pretrained`
    text_encoder    the same of a text encoder, as transformers saves it
    model           a whole diffusers folder, a checkpoint, or a name that `load_family` knows

What is recognised is told by names and shapes alone: no weight is loaded before `load`. Pickles never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo.errors import UserError
from duo.foreign import json_value, read_text
from duo.models import EMBEDDED, INDEX, family_of, load_family, local_folder, written_out
from duo.rundir import RunDir, digest
from duo.sources import HUB, PICKLES, hub_file, hub_files, hub_path, is_hub_id

if TYPE_CHECKING:
    import torch

    from duo.delta import Delta
    from duo.plugins import Family

# What of a delta is only attached to the model's weights, and so can be left out again by who has the files.
ADAPTERS = ("lora", "gated")
WEIGHTS = ".safetensors"
CONFIG = "config.json"
DELTA = "delta.safetensors"
KNOWN = (
    "give a delta or run folder of duo, a LoRA, weights of a denoiser or of a text encoder (.safetensors), a diffusers "
    "folder, or the hub id of one"
)
# How names begin, past a component's own prefix, that no other network has. The second row is that of the authors'
# own code, before diffusers renamed it.
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "model.diffusion_model.")
_DENOISER = ("down_blocks.", "mid_block.", "up_blocks.", "transformer_blocks.", "single_transformer_blocks.")
_AUTHORS = ("input_blocks.", "middle_block.", "output_blocks.", "joint_blocks.", "double_blocks.", "single_blocks.")
_BESIDE = ("cond_stage_model.", "conditioner.", "first_stage_model.", "text_encoders.", "vae.")  # in checkpoints
_CLIP = ("text_model.", "embeddings.token_embedding.", "embeddings.position_embedding.", "encoder.layers.")
_T5 = ("shared.", "encoder.block.")
_LORA = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.")
_OTHER_LORA = (".hada_w", ".lokr_", ".lora_magnitude_vector", ".dora_scale")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What `find_artefact` recognised.

    `path` is what the user gave, in full where it is on this machine; `source` is where the weights lie: a file, a
    folder, or for a whole model what `load_family` takes. `digest` is a sha256 over the files that are read, and for a
    whole model of the hub its commit. `form` is a delta's kind.
    """

    kind: str
    path: str
    source: str
    digest: str
    form: str | None = None

    @property
    def droppable(self) -> bool:
        """Whether it stands beside the model's weights as an adapter, which one call leaves out again."""
        return self.kind == "lora" or self.form in ADAPTERS

    def delta(self) -> Delta:
        """Of kind "delta": the delta, to be attached to the original."""
        from duo.delta import Delta

        if self.kind != "delta":
            raise ValueError(f"{self.path} is no delta but a {self.kind}")
        return Delta.load(Path(self.source))

    def load(
        self,
        original: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        config: str | None = None,
    ) -> Family:
        """The erased model, a family of its own beside that of `original` (with `config`'s settings, where that is a
        single checkpoint). A delta is attached instead (`delta`).

        Raises `UserError` of one line, which names the file and the weight, where the artefact is not of that model, is
        damaged, or cannot be taken over as a whole. What differs is told by `duo.artefacts.differences`.
        """
        if self.kind == "delta":
            raise ValueError(f"{self.path} is a delta: attach it to the original")
        if self.kind == "model":
            return self._whole(original, device=device, dtype=dtype, config=config)
        from duo.families import _erased

        base = load_family(original, device=device, dtype=dtype, config=config)
        return _erased.build(self.kind, Path(self.source), base, name=self.path)

    def _whole(
        self, original: str, *, device: torch.device | str, dtype: torch.dtype | None, config: str | None
    ) -> Family:
        """The erased model from a folder or checkpoint that holds all of it."""
        single = Path(self.source).is_file()
        settings = (config if Path(original).expanduser().is_file() else original) if single else None
        mine, theirs = family_of(self.source, config=settings), family_of(original, config=config)
        if mine is not theirs:
            raise UserError(
                f"{self.path} is a {' or '.join(sorted(mine.pipelines))}, but the original {original!r} is a "
                f"{' or '.join(sorted(theirs.pipelines))}; give the model that was erased as --original"
            )
        return load_family(self.source, device=device, dtype=dtype, config=settings)


def find_artefact(path: str) -> Artefact:
    """What `path` holds: a file, a folder, a hub id, or `hub:owner/name/path` for a part of a hub repository.

    Raises `UserError` where it is none of the kinds, and of what is on this machine the hub is not asked.
    """
    if path in EMBEDDED:
        family_of(path)  # tells where it is not in this installation
        return Artefact(kind="model", path=path, source=path, digest=_of_all(local_folder(path) or Path()))
    here = Path(path).expanduser()
    if path and here.exists():
        return _local(here, named=written_out(path))
    place = hub_path(path) or ((path, "") if is_hub_id(path) else None)
    if place is None:
        raise UserError(f"{path!r} is neither a file nor a folder here, nor a hub id; {KNOWN}")
    return _on_hub(*place, named=path)


def differences(original: Family, erased: Family, *, name: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """How many tensors of each network the erasure changed, and what an audit should say of it besides.

    Told are an erasure that changes nothing, or no more than rounding does, and another scheduler or VAE, for then
    images differ by that alone. Raises `UserError` where the two are not of one architecture. `name` is the artefact's.
    """
    from duo.families import _erased

    return _erased.differences(original, erased, name=name)


def _local(path: Path, *, named: str) -> Artefact:
    if path.is_file():
        return _file(path, named=named)
    if not path.is_dir():
        raise UserError(f"{named} is neither a file nor a folder; {KNOWN}")
    if (path / "run.json").is_file():
        file, recorded = RunDir(path).erasure()
        return _delta(file, named=named, digested=recorded)
    if (path / DELTA).is_file():
        return _file(path / DELTA, named=named)
    if (path / INDEX).is_file():
        return Artefact(kind="model", path=named, source=named, digest=_of_all(path))
    names = sorted(one.name for one in path.iterdir() if one.is_file())
    return _folder(path, names, named=named)


def _folder(path: Path, names: Sequence[str], *, named: str) -> Artefact:
    """Of a folder with the files `names` that is no whole model: one network's, or of one file of weights."""
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if not weights:
        pickle = next((name for name in names if name.endswith(PICKLES)), None)
        if pickle is not None:
            raise _pickled(f"{named.rstrip('/')}/{pickle}")
        raise UserError(f"{named} holds no {WEIGHTS} file and no {INDEX}; {KNOWN}")
    if CONFIG in names:
        files = [path / name for name in (CONFIG, *weights)]
        return Artefact(kind=_network(path / CONFIG), path=named, source=str(path), digest=_of(path, files))
    if len(weights) > 1:
        raise UserError(f"{named} holds several files of weights ({', '.join(weights)}); give one of them")
    return _file(path / weights[0], named=named)


def _network(config: Path) -> str:
    """Which kind of network a folder's config.json is of."""
    try:
        table = json_value(read_text(config))
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}, expected an object")
        known = {"model_type", "_class_name"} & {*table}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{config} cannot be read as JSON: {error}") from error
    name, model = str(table.get("_class_name")), str(table.get("model_type"))
    if name.startswith("UNet2DCondition") or "Transformer2DModel" in name:
        return "denoiser"
    if model in ("clip", "clip_text_model", "t5"):
        return "text_encoder"
    told = f"a {name if '_class_name' in known else model}" if known else "no network that is known here"
    raise UserError(f"{config} is that of {told}, neither of a denoiser nor of a text encoder; {KNOWN}")


def _file(path: Path, *, named: str) -> Artefact:
    """What one file holds, by the names of its tensors."""
    if path.suffix in PICKLES:
        raise _pickled(named)
    if path.suffix != WEIGHTS:
        raise UserError(f"{named} is no {WEIGHTS} file; {KNOWN}")
    keys, record = _names(path)
    if "schema" in record and "kind" in record:
        return _delta(path, named=named, digested=digest(path))
    return Artefact(kind=_kind(keys, named), path=named, source=str(path), digest=digest(path))


def _names(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of a file's tensors, and the record of one that duo wrote."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            record = json_value((file.metadata() or {}).get("duo", "{}"))
            return list(file.keys()), record if isinstance(record, dict) else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); download it again") from error


def _kind(keys: Sequence[str], named: str) -> str:
    """What a file with tensors of these names is."""
    if other := next((key for key in keys if any(mark in key for mark in _OTHER_LORA)), None):
        raise UserError(
            f"{named} holds {other}, a LoHa, LoKr or DoRA, which diffusers reads in part or not at all; merge it into "
            "a model with the software that made it, and give that"
        )
    if any(mark in key for key in keys for mark in _LORA):
        return "lora"
    rests = [_bare(key) for key in keys]
    if any(rest.startswith((*_DENOISER, *_AUTHORS)) for rest in rests):
        return "model" if any(key.startswith(_BESIDE) for key in keys) else "denoiser"
    if any(rest.startswith((*_CLIP, *_T5)) for rest in rests):
        return "text_encoder"
    first = next(iter(keys), None)
    told = "holds no tensor" if first is None else f"holds {first}, a name that is known of no erasure"
    raise UserError(f"{named} {told}; {KNOWN}")


def _bare(key: str) -> str:
    """A tensor's name without its component's."""
    return next((key.removeprefix(one) for one in _COMPONENTS if key.startswith(one)), key)


def _delta(path: Path, *, named: str, digested: str) -> Artefact:
    _, record = _names(path)
    return Artefact(kind="delta", path=named, source=str(path), digest=digested, form=str(record.get("kind")))


def _on_hub(source: str, path: str, *, named: str) -> Artefact:
    """A hub repository, or a file or folder of it; no more of it is fetched than is needed to know and to load it."""
    asked = {"kind": "an erasure", "give": "a local file or folder"}
    every = hub_files(source, **asked)
    if not path and INDEX in every:
        index = hub_file(source, INDEX, **asked)
        return Artefact(kind="model", path=named, source=source, digest=index.parent.name)
    if path in every:
        if path.endswith(PICKLES):
            raise _pickled(named)
        return _file(hub_file(source, path, **asked), named=named)
    below = f"{path}/" if path else ""
    names = [one.removeprefix(below) for one in every if one.startswith(below) and "/" not in one.removeprefix(below)]
    if path and not names:
        raise UserError(f"{named}: {source} has no such file or folder; it has {', '.join(_folders(every))}")
    if INDEX in names:
        raise UserError(f"{named} is a diffusers folder within a repository; run `hf download {source}`, and give it")
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if len(weights) == 1 or (weights and CONFIG in names):
        wanted = [name for name in names if name in (CONFIG, *weights) or name.endswith(f"{WEIGHTS}.index.json")]
        fetched = [hub_file(source, f"{below}{name}", **asked) for name in wanted]
        return _folder(fetched[0].parent, wanted, named=named)
    if not weights and not any(name.endswith(PICKLES) for name in names):
        raise UserError(
            f"{named} holds no {WEIGHTS} file and no {INDEX}; give a part of it, {HUB}{source}/PATH, of "
            f"{', '.join(_folders(every))}"
        )
    return _folder(Path(), names, named=named)


def _folders(names: Sequence[str]) -> list[str]:
    """What stands at the top of a repository, in order."""
    return list(dict.fromkeys(name.partition("/")[0] for name in names))


def _pickled(named: str) -> UserError:
    return UserError(
        f"{named} is a pickle, which can run code and is not read; convert it where that is safe: `save_pretrained` of "
        "the model that has it, or safetensors.torch.save_file(torch.load(PICKLE, weights_only=True), NEW_FILE)"
    )


def _of_all(folder: Path) -> str:
    """One digest over the weights and settings of a model's folder, whatever else lies there."""
    return _of(folder, [path for path in folder.rglob("*") if path.suffix in (WEIGHTS, ".json") and path.is_file()])


def _of(folder: Path, files: Sequence[Path]) -> str:
    return digest({path.relative_to(folder).as_posix(): digest(path) for path in sorted(files)})
