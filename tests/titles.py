"""Prepared datasets of titles alone, posters and a BERT of two layers: for tests of what is learned from content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from m5.schema import ALWAYS, Manifest, Split, Vocabulary

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "quiet", "harbour", "storm", "night", "."]


def write_dataset(folder: Path, titles: dict[str, list], metadata: dict[str, list[list[str]]] | None = None) -> Path:
    """A prepared dataset of titles alone, with their lists of values by metadata kind."""
    n = len(titles["title"])
    frame = pd.DataFrame(
        {
            "title_id": [f"t{i}" for i in range(n)],
            "title": titles["title"],
            "description": titles.get("description", [""] * n),
            "category": np.zeros(n, dtype=np.int32),
            "artwork": titles.get("artwork", [""] * n),
            "released": np.full(n, ALWAYS),
            "train_count": np.ones(n, dtype=np.int64),
            "cold": titles.get("cold", [False] * n),
            **(metadata or {}),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(folder / "titles.parquet")
    Manifest(
        source="tables",
        name="test",
        n_users=0,
        n_titles=n,
        n_events=0,
        n_cold_titles=int(frame["cold"].sum()),
        split=Split(kind="time"),
        split_counts={},
        categories=Vocabulary(name="category", values=()),
        metadata=tuple(metadata or ()),
    ).write(folder)
    return folder


def write_tiny_bert(folder: Path) -> Path:
    """A BERT of two small layers with random weights, in transformers' format."""
    from m5.torchvision_shim import declare_missing_operators

    declare_missing_operators()
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return folder


def paint(path: Path, colour: tuple[int, int, int]) -> str:
    Image.new("RGB", (24, 32), colour).save(path)
    return str(path)
