"""A tiny CLIP of the real class with random weights, in the folder layout of the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `CLIPModel`: 16-pixel pictures, vectors of 8, the tokenizer of `toybox`. Read only."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from duo import toybox

    folder = tmp_path_factory.mktemp("clip") / "tiny"
    tokenizer = CLIPTokenizer.from_pretrained(toybox.WEIGHTS / "toybox" / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                projection_dim=8,
                vision_config={**tower, "image_size": 16, "patch_size": 8},
                text_config={**tower, **text},
            )
        )
        for weight in model.parameters():  # the initial weights are so small that pictures would hardly differ
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
