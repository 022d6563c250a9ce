"""Write the test vectors of a form of the format: ``python -m tests.vectors.make tests/vectors/v2``.

Updates are encoded by a schema into a folder ``v2``, and so that they describe themselves into ``v1``. Vectors of a version
that was released are never written again. They are decoders' ground truth; an encoder may choose other codings for the same
update, so that another version of zlib may write other bytes.
"""

import json
import math
import sys
from pathlib import Path

import torch

from lightning_fedsparse.payload import MaskSet, Schema, decode, encode
from lightning_fedsparse.update import SparseUpdate, gather
from tests.vectors.describing import described, described_masks, described_schema

SEED = 20


def vectors():
    """Name -> (update, reference or None, type of values, block)."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.02

    def random_mask(*shape, density):
        return torch.rand(shape, generator=generator) < density

    yield "empty", SparseUpdate({}, {}), None, "float32", None
    yield (
        "dense",
        SparseUpdate(
            {"weight": normal(3, 4), "größe": torch.tensor([-0.0, 1e-45, 3.4028234e38]), "scalar": torch.tensor(2.5)},
            {"weight": None, "größe": None, "scalar": None},
            num_examples=300,
            metrics={"train_loss": 0.25, "accuracy": math.inf},
        ),
        None,
        "float32",
        None,
    )
    every = {
        "float16": normal(3).half(),
        "bfloat16": normal(3).bfloat16(),
        "float64": normal(3).double() / 3,
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.tensor([-(2**31), 5], dtype=torch.int32),
        "int16": torch.tensor([-300, 300], dtype=torch.int16),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([[True], [False]]),
        "nothing": torch.empty(3, 0),
    }
    buffers = {"mask": torch.tensor([-math.inf, 0.0]), "steps": torch.tensor(7)}
    yield (
        "dtypes",
        SparseUpdate(every, dict.fromkeys(every), kind="delta", absent="zero", buffers=buffers),
        None,
        "float32",
        None,
    )
    planes = {"float32": normal(20, 10), "float16": normal(200).half(), "bfloat16": normal(200).bfloat16()}
    yield "planes", SparseUpdate(planes, dict.fromkeys(planes)), None, "float32", None

    masks = {
        "bitmap": random_mask(3, 3, density=0.5),
        "packed_bitmap": torch.arange(1200).reshape(30, 40) % 64 < 32,
        "gaps": random_mask(1500, density=0.25),
        "gaps_of_dropped": random_mask(1500, density=0.8),
        "gaps_shifted": random_mask(900, density=0.02),
        "escaped_gaps": torch.arange(2000) % 16 == 15,
        "gaps_in_bytes": torch.arange(3000) % 100 == 99,
        "nothing": torch.zeros(50, dtype=torch.bool),
        "everything": torch.ones(5, 10, dtype=torch.bool),
        "dense": None,
    }
    masks["escaped_gaps"][15:1000] = False
    held = MaskSet.of(masks)
    # values are few numbers only: the vectors are about positions, and stay readable
    tensors = {
        name: torch.ones(7) if mask is None else (torch.arange(mask.numel()) % 5 - 2).to(torch.int8).view(mask.shape)
        for name, mask in masks.items()
    }
    state = SparseUpdate(gather(tensors, held), held, absent="zero", mask_id=held.id)
    yield "positions", state, None, "float32", None
    yield "known", SparseUpdate(gather(tensors, held), held, 42, mask_id=held.id), held, "float32", None
    moved = {name: None if mask is None else mask.clone() for name, mask in masks.items()}
    moved["gaps"].view(-1)[held.positions("gaps")[::20]] = False
    moved["gaps"][[5, 77, 1400]] = True
    moved["gaps_of_dropped"][-1] ^= True
    after = MaskSet.of(moved)
    yield "changes", SparseUpdate(gather(tensors, after), after, absent="unheld", kind="delta"), held, "float32", None
    few = MaskSet.of({name: after[name] for name in ("dense", "gaps")})
    yield "named_changes", SparseUpdate(gather(tensors, few), few), held, "float32", None

    rounded = {
        "a": normal(10, 30),
        "b": torch.tensor([0.0, 1.0, -7.0]),
        "c": normal(65).double(),
        "d": normal(1).half(),
    }
    rounded["e"] = torch.zeros(300).index_fill_(
        0, torch.tensor([7, 250]), 0.5
    )  # few numbers: Huffman codes are shorter
    some = MaskSet.of({"a": random_mask(10, 30, density=0.5), "b": None, "c": None, "d": None, "e": None})
    update = SparseUpdate(gather(rounded, some), some, kind="delta", buffers={"mean": normal(4)})
    for value_type in ("bfloat16", "float16", "int8", "int4"):
        yield value_type, update, None, value_type, 64 if value_type == "int8" else None
    yield "int4_blocks", update, None, "int4", 10


def schema_of(update: SparseUpdate) -> Schema:
    """The schema of a model that has just these tensors."""
    shapes = {name: (update.values[name] if mask is None else mask).shape for name, mask in update.masks.items()}
    weights = {name: torch.empty(shape, dtype=update.values[name].dtype) for name, shape in shapes.items()}
    return Schema.of(weights, update.buffers)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for name, update, reference, value_type, block in vectors():
        schema = schema_of(update) if folder.name == "v2" else None
        data = encode(update, reference=reference, schema=schema, values=value_type, block=block, seed=SEED)
        (folder / f"{name}.bin").write_bytes(data)
        held = None if reference is None else {"id": reference.id, **described_masks(reference)}
        update = described(decode(data, reference=reference, schema=schema))
        named = {} if schema is None else {"schema": described_schema(schema)}
        index[name] = {"reference": held, **named, "update": update}
    (folder / "vectors.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
