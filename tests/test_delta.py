from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_flow
import tiny_unet
from duo.bases import base_digest
from duo.checkpoint import write_tensors
from duo.delta import Delta, compose
from duo.errors import UserError
from duo.plugins import Sampling
from duo.training import attach_lora

PROMPTS, SEEDS, SHORT = ["a red house", "a boat"], [1, 2], Sampling(num_inference_steps=3, guidance_scale=3.0)


def images(model) -> np.ndarray:
    drawn = model.generate(PROMPTS, seeds=SEEDS, sampling=SHORT)
    return np.stack([np.asarray(image, dtype=np.int16) for image in drawn])


def outputs(model) -> torch.Tensor:
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(x_t, torch.tensor([10, 700]), model.text(PROMPTS))


def random_lora(model, scopes: tuple[str, ...] = ("attention", "convolutions", "feed_forward")):
    """A delta with alpha ≠ rank, and the outputs of the model with the peft adapter that it was taken from."""
    layers = [name for scope in scopes for name in model.layers(scope)]
    with attach_lora(model.denoiser, layers, rank=3, alpha=6.0, seed=0) as lora:
        generator = torch.Generator().manual_seed(1)
        for parameter in lora.parameters:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted = outputs(model)
        tensors = lora.tensors()
    record = {"model": "tiny", "lora": {"rank": 3, "alpha": 6.0}}
    return Delta(kind="lora", component=model.component, tensors=tensors, record=record), adapted


def test_attached_merged_and_trained_adapters_agree(tiny_sd) -> None:
    before, keys = outputs(tiny_sd), list(tiny_sd.denoiser.state_dict())
    delta, adapted = random_lora(tiny_sd)
    with delta.attached(tiny_sd):
        attached = outputs(tiny_sd)
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(attached, adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(tiny_sd), before)
    delta.merge(tiny_sd)
    assert torch.equal(outputs(tiny_sd), attached)
    assert list(tiny_sd.denoiser.state_dict()) == keys


def test_after_the_context_the_weights_are_the_same_tensors(tiny_sd) -> None:
    delta, _ = random_lora(tiny_sd, ("self_attention",))
    before = {name: tensor.data_ptr() for name, tensor in tiny_sd.denoiser.state_dict().items()}
    with pytest.raises(RuntimeError, match="within"), delta.attached(tiny_sd):
        raise RuntimeError("within")
    assert {name: tensor.data_ptr() for name, tensor in tiny_sd.denoiser.state_dict().items()} == before


def test_weights_of_a_delta_add_up(tiny_sd) -> None:
    delta, _ = random_lora(tiny_sd, ("attention",))
    before = outputs(tiny_sd)
    with delta.attached(tiny_sd):
        once = outputs(tiny_sd)
    with delta.attached(tiny_sd, weight=0.25), delta.attached(tiny_sd, weight=0.75):
        torch.testing.assert_close(outputs(tiny_sd), once, atol=1e-5, rtol=1e-5)
    with delta.attached(tiny_sd), delta.attached(tiny_sd, weight=-1.0):
        torch.testing.assert_close(outputs(tiny_sd), before, atol=1e-5, rtol=1e-5)


def test_diffusers_loads_the_file_and_draws_the_same_images(tiny_sd, make_tiny_pipeline, tmp_path: Path) -> None:
    delta, _ = random_lora(tiny_sd)
    delta.save(tmp_path / "delta.safetensors")
    pipeline = make_tiny_pipeline()
    plain = images(tiny_sd)
    pipeline.load_lora_weights(tmp_path, weight_name="delta.safetensors")
    theirs = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=3,
        guidance_scale=3.0,
    ).images
    with delta.attached(tiny_sd):
        ours = images(tiny_sd)
    assert np.abs(ours - np.stack([np.asarray(image, dtype=np.int16) for image in theirs])).max() <= 1
    assert np.abs(ours - plain).max() > 1


@pytest.fixture(params=["sd2", "sdxl", "sd3", "flux"])
def family(request: pytest.FixtureRequest, vocabulary: Path) -> tuple[type, Any]:
    """A family's class, and a function that builds its tiny pipeline anew."""
    from duo.families.flux import Flux
    from duo.families.sd import Sd
    from duo.families.sd3 import Sd3
    from duo.families.sdxl import Sdxl

    return {
        "sd2": (Sd, lambda: tiny_unet.sd2_v_pipeline(vocabulary)),
        "sdxl": (Sdxl, lambda: tiny_unet.sdxl_pipeline(vocabulary)),
        "sd3": (Sd3, lambda: tiny_flow.sd3_pipeline(vocabulary)),
        "flux": (Flux, lambda: tiny_flow.flux_pipeline(vocabulary)),
    }[request.param]


def random_delta(model, names, *, seed: int = 0, rank: int = 3) -> Delta:
    """A LoRA of `rank` on the layers `names`, strong enough to be seen in images."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in sorted(names):
        weight = dict(model.denoiser.named_modules())[name].weight
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=generator)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": 0.05 * up}
    return Delta(kind="lora", component=model.component, tensors=tensors, record={"model": model.name})


def test_diffusers_loads_the_file_of_every_family(family, tmp_path: Path) -> None:
    cls, make = family
    model = cls(make(), name="tiny")
    delta = random_delta(model, model.layers("all"))
    delta.save(tmp_path / "delta.safetensors")
    loaded = make()
    loaded.load_lora_weights(tmp_path, weight_name="delta.safetensors")
    plain = images(model)
    with delta.attached(model):
        ours = images(model)
    assert np.abs(ours - images(cls(loaded, name="tiny"))).max() <= 1
    assert np.abs(ours - plain).max() > 8


# --- composition ----------------------------------------------------------------------------------


def test_composed_erasures_are_their_weighted_sum(tiny_sd) -> None:
    first, _ = random_lora(tiny_sd, ("self_attention", "convolutions"))
    second = random_delta(tiny_sd, tiny_sd.layers("attention"), rank=5)
    both = compose([first, second], [1.0, 0.5])
    name = next(iter(tiny_sd.layers("self_attention")))
    wanted = sum(w * b @ a for w, (a, b) in ((1.0, first.factors(name)), (0.5, second.factors(name))))
    down, up = both.factors(name)
    assert len(down) == 3 + 5
    torch.testing.assert_close(up @ down, wanted)
    with both.attached(tiny_sd):
        ours = outputs(tiny_sd)
    with first.attached(tiny_sd), second.attached(tiny_sd, weight=0.5):
        torch.testing.assert_close(ours, outputs(tiny_sd), atol=1e-5, rtol=1e-5)
    with first.attached(tiny_sd):
        assert (ours - outputs(tiny_sd)).abs().max() > 1e-3
    assert [part["weight"] for part in both.record["composed"]] == [1.0, 0.5]
    assert both.record["model"] == "tiny"


def test_diffusers_loads_composed_erasures_of_different_ranks(tiny_sd, make_tiny_pipeline, tmp_path: Path) -> None:
    from duo.families.sd import Sd

    first, _ = random_lora(tiny_sd, ("self_attention", "convolutions"))
    both = compose([first, random_delta(tiny_sd, tiny_sd.layers("attention"), rank=5)])
    both.save(tmp_path / "delta.safetensors")
    loaded = make_tiny_pipeline()
    loaded.load_lora_weights(tmp_path, weight_name="delta.safetensors")
    with both.attached(tiny_sd):
        assert np.abs(images(tiny_sd) - images(Sd(loaded, name="tiny"))).max() <= 1


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({"record": {"model": "other"}}, None, "different models, 'tiny' and 'other'"),
        ({"kind": "full"}, None, "different kinds, 'lora' and 'full'"),
        ({"component": "transformer"}, None, "different components"),
        ({"tensors": {"a.lora_A.weight": torch.ones(1, 4), "a.lora_B.weight": torch.ones(3, 1)}}, None, "at layer a"),
        ({}, [1.0], "2 erasures but 1 weights"),
        ({}, [1.0, -1.0], "the weight -1, expected above 0"),
        ({}, [1.0, float("nan")], "the weight nan"),
    ],
)
def test_what_cannot_be_composed_is_refused(change, weights, message: str) -> None:
    tensors = {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.ones(3, 1)}
    delta = Delta(kind="lora", component="unet", tensors=tensors, record={"model": "tiny"})
    with pytest.raises(UserError, match=message):
        compose([delta, dataclasses.replace(delta, **change)], weights)


def test_a_saved_delta_comes_back(tiny_sd, tmp_path: Path) -> None:
    delta, _ = random_lora(tiny_sd, ("self_attention",))
    path = tmp_path / "delta.safetensors"
    delta.save(path)
    loaded = Delta.load(path)
    assert (loaded.kind, loaded.component, loaded.record) == (delta.kind, "unet", delta.record)
    assert loaded.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], delta.tensors[name]) for name in delta.tensors)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_delta_of_another_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    write_tensors(path, {"denoiser.x": torch.zeros(1)}, {"schema": 2, "kind": "lora"})
    with pytest.raises(UserError, match=r"delta\.safetensors: schema 2 is not known here, only 1; use the duo .* it$"):
        Delta.load(path)


def test_a_delta_for_another_model_is_refused_before_anything_changes(tiny_sd) -> None:
    delta, _ = random_lora(tiny_sd, ("self_attention",))
    before = outputs(tiny_sd)
    stranger = Delta(
        kind="lora",
        component="unet",
        tensors=dict(delta.tensors) | {"zzz.lora_A.weight": torch.ones(1, 4), "zzz.lora_B.weight": torch.ones(4, 1)},
        record=delta.record,
    )
    with pytest.raises(UserError, match="does not fit model 'tiny' at layer zzz"):
        stranger.merge(tiny_sd)
    name = next(iter(tiny_sd.layers("self_attention")))
    narrow = Delta(
        kind="lora",
        component="unet",
        tensors={f"{name}.lora_A.weight": torch.ones(1, 4), f"{name}.lora_B.weight": torch.ones(4, 1)},
        record={},
    )
    with pytest.raises(UserError, match="does not fit"), narrow.attached(tiny_sd):
        pass
    assert torch.equal(outputs(tiny_sd), before)


def test_a_file_that_is_no_delta(tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        Delta.load(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        Delta.load(path)
    for kind, component in (("riddle", "unet"), ("lora", "vae")):
        Delta(kind=kind, component=component, tensors={"a": torch.ones(1)}, record={}).save(path)
        with pytest.raises(UserError, match="not a delta"):
            Delta.load(path)


# --- whole weights ---------------------------------------------------------------------------------


def tuned_delta(model, scope: str = "text_inputs", *, seed: int = 0) -> tuple[Delta, torch.Tensor]:
    """A delta of kind "weights" after a random change, and what the changed model predicted."""
    from duo.training import tune_weights

    with tune_weights(model.denoiser, list(model.layers(scope))) as tuned:
        generator = torch.Generator().manual_seed(seed)
        for parameter in tuned.parameters:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        changed = outputs(model)
        with tuned.disabled():
            frozen = outputs(model)
        tensors = tuned.differences()
    assert torch.equal(frozen, outputs(model))
    return Delta(kind="weights", component=model.component, tensors=tensors, record={"model": model.name}), changed


def test_whole_weights_are_attached_and_merged(tiny_sd, tmp_path: Path) -> None:
    before, pointers = outputs(tiny_sd), [p.data_ptr() for p in tiny_sd.denoiser.parameters()]
    delta, changed = tuned_delta(tiny_sd, "convolutions")  # which have biases
    assert any(name.endswith("bias.diff") for name in delta.tensors)
    assert [p.data_ptr() for p in tiny_sd.denoiser.parameters()] == pointers
    assert not any(p.requires_grad for p in tiny_sd.denoiser.parameters())
    delta.save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert delta.layers() == sorted(tiny_sd.layers("convolutions"))
    with delta.attached(tiny_sd):
        torch.testing.assert_close(outputs(tiny_sd), changed, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(tiny_sd), before)
    assert (changed - before).abs().max() > 1e-2
    delta.merge(tiny_sd)
    torch.testing.assert_close(outputs(tiny_sd), changed, atol=1e-5, rtol=1e-5)


def test_whole_weights_add_up(tiny_sd) -> None:
    (first, _), (second, _) = tuned_delta(tiny_sd), tuned_delta(tiny_sd, "self_attention", seed=1)
    both = compose([first, second, first], [0.5, 1.0, 0.25])
    name = next(iter(first.tensors))
    torch.testing.assert_close(both.tensors[name], 0.75 * first.tensors[name])
    with first.attached(tiny_sd, weight=0.75), second.attached(tiny_sd):
        wanted = outputs(tiny_sd)
    with both.attached(tiny_sd):
        torch.testing.assert_close(outputs(tiny_sd), wanted, atol=1e-5, rtol=1e-5)
    lora, _ = random_lora(tiny_sd)
    with pytest.raises(UserError, match="of different kinds, 'weights' and 'lora'"):
        compose([first, lora])


def test_whole_weights_of_another_model_are_refused(tiny_sd, tiny_sdxl) -> None:
    delta, _ = tuned_delta(tiny_sd)
    with pytest.raises(UserError, match="was made for 'tiny' and does not fit"), delta.attached(tiny_sdxl):
        pass


def test_half_precision_weights_are_not_trained(tiny_sd) -> None:
    from duo.training import tune_weights

    tiny_sd.denoiser.half()
    layers = list(tiny_sd.layers("text_inputs"))
    with (
        pytest.raises(UserError, match="is float16, in which small steps are lost"),
        tune_weights(tiny_sd.denoiser, layers),
    ):
        pass


# --- damaged files, and other bases -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.lora_A.weight": torch.ones(2, 3)}, r"holds a\.lora_A\.weight but no a\.lora_B\.weight"),
        ({"a.lora_B.weight": torch.ones(3, 2)}, r"holds a\.lora_B\.weight but no a\.lora_A\.weight"),
        ({"a.weight": torch.ones(3, 2)}, r"holds a\.weight but no a\.weight\.lora_A"),
        ({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 1)}, "are of different ranks"),
        ({"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.ones(3, 2)}, "are of different ranks"),
        (
            {"a.lora_A.weight": torch.tensor([[1, float("nan")]]), "a.lora_B.weight": torch.ones(3, 1)},
            r"a\.lora_A\.weight holds NaN or infinity",
        ),
        (
            {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.full((3, 1), float("-inf"))},
            r"a\.lora_B\.weight holds NaN or infinity",
        ),
    ],
)
def test_a_file_that_cannot_be_a_change_of_weights_is_refused(tensors, message: str, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    Delta(kind="lora", component="unet", tensors=tensors, record={}).save(path)
    with pytest.raises(UserError, match=message) as caught:
        Delta.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


GATED = {"0.a.lora_A.weight": torch.ones(1, 3), "0.a.lora_B.weight": torch.ones(3, 1)}
EMBEDS = {"0.gate.embeds": torch.ones(1, 2, 4)}
GATE = {"concepts": ["fire"], "token_ids": [[3]]}


@pytest.mark.parametrize(
    ("kind", "tensors", "record", "message"),
    [
        ("weights", {"a.weight": torch.ones(3, 2)}, {}, r"holds a\.weight, which is no name .* of kind 'weights'"),
        ("gated", {**GATED, "a.gate.embeds": torch.ones(1, 2, 4)}, {"gates": [GATE]}, r"holds a\.gate\.embeds, which"),
        ("gated", GATED, {"gates": [GATE]}, r"adapter 0 but no 0\.gate\.embeds"),
        ("gated", {**GATED, **EMBEDS, "2.gate.embeds": torch.ones(1, 2, 4)}, {}, r"adapter 1 but no 1\.gate\.embeds"),
        ("gated", {**GATED, **EMBEDS}, {}, "has 1 adapters but 0 gates"),
        ("gated", {**GATED, **EMBEDS}, {"gates": [GATE, GATE]}, "has 1 adapters but 2 gates"),
        ("gated", {**GATED, **EMBEDS}, {"gates": [{"concepts": ["fire"]}]}, "gate 0 has no token_ids"),
    ],
)
def test_a_file_that_lacks_what_its_kind_needs_is_refused(
    kind: str, tensors, record, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "delta.safetensors"
    Delta(kind=kind, component="unet", tensors=tensors, record=record).save(path)
    with pytest.raises(UserError, match=message) as caught:
        Delta.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["lora", "gated"])
def test_an_erasure_composed_with_itself_can_be_saved(kind: str, tmp_path: Path) -> None:
    plain = {name.removeprefix("0."): tensor for name, tensor in GATED.items()}
    tensors = {**GATED, **EMBEDS} if kind == "gated" else plain
    delta = Delta(kind=kind, component="unet", tensors=tensors, record={"gates": [GATE]} if kind == "gated" else {})
    both = compose([delta, delta])
    both.save(tmp_path / "both.safetensors")
    again = Delta.load(tmp_path / "both.safetensors")
    assert again.tensors.keys() == both.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in both.tensors.items())


def test_a_composition_that_overflows_is_refused() -> None:
    tensors = {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.full((3, 1), 1e30)}
    delta = Delta(kind="lora", component="unet", tensors=tensors, record={})
    assert compose([delta, delta], [1.0, 2.0])
    with pytest.raises(UserError, match=r"come to a\.lora_B\.weight that is not finite"):
        compose([delta, delta], [1.0, 1e30])


def bound(delta: Delta, model) -> Delta:
    return dataclasses.replace(delta, record={**delta.record, "base": base_digest(model, delta.layers())})


def test_a_delta_of_another_base_is_refused_before_anything_changes(make_tiny_pipeline) -> None:
    from duo.families.sd import Sd

    model, other, config = (Sd(make_tiny_pipeline(), name="tiny") for _ in range(3))
    delta = bound(random_delta(model, model.layers("self_attention")), model)
    first = min(model.layers("self_attention"))
    other.denoiser.get_submodule(first).weight.data[0, 0] += 1e-2  # the name says nothing of it
    before = outputs(other)
    composed = compose([delta, random_delta(model, model.layers("attention"))])
    for one in (delta, composed, compose([composed, delta])):
        with pytest.raises(UserError, match="made for 'tiny' with other weights than model 'tiny' has at layer"):
            one.merge(other)
        with pytest.raises(UserError, match="made for 'tiny' with other weights"), one.attached(other):
            pass
        with one.attached(model):
            pass
    assert torch.equal(outputs(other), before)
    config.denoiser.register_to_config(a_field_of_a_later_diffusers=1)
    config.denoiser.half().float()  # as from the files of the variant fp16
    delta.merge(config)


def test_attached_deltas_are_compared_with_the_base_below_them(tiny_sd) -> None:
    first, second = (
        bound(random_delta(tiny_sd, tiny_sd.layers("self_attention"), seed=seed), tiny_sd) for seed in (0, 1)
    )
    with first.attached(tiny_sd), second.attached(tiny_sd), first.attached(tiny_sd):
        assert base_digest(tiny_sd, first.layers()) == first.record["base"]
    with second.attached(tiny_sd):
        pass
    first.merge(tiny_sd)
    with pytest.raises(UserError, match="several erasures are composed before they are merged"):
        second.merge(tiny_sd)


@pytest.mark.parametrize(
    ("made_in", "used_in"),
    [("float32", "float16"), ("float32", "bfloat16"), ("float16", "float32"), ("bfloat16", "float16")],
)
def test_the_base_is_known_in_another_precision(tiny_folder: Path, made_in: str, used_in: str) -> None:
    from duo.models import load_family

    made = load_family(str(tiny_folder), dtype=getattr(torch, made_in))
    used = load_family(str(tiny_folder), dtype=getattr(torch, used_in))
    delta = bound(random_delta(made, made.layers("self_attention")), made)
    with delta.attached(used):
        pass
    used.denoiser.get_submodule(delta.record["base"]["layers"][1]).weight.data.mul_(1.5)
    if "float32" in (made_in, used_in):
        with pytest.raises(UserError, match="with other weights"):
            delta.merge(used)


def test_only_the_ends_and_the_middle_of_the_layers_are_hashed(tiny_sd) -> None:
    names = sorted(tiny_sd.layers("attention"))
    found = base_digest(tiny_sd, names)
    assert found["layers"] == sorted({names[0], names[len(names) // 2], names[-1]})
    assert found.keys() == {"layers", "float32", "bfloat16", "float16"}
    tiny_sd.denoiser.get_submodule(names[1]).weight.data += 1
    assert base_digest(tiny_sd, names) == found
