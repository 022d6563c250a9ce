"""Updates as plain JSON, to the bit."""

import torch

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def described(update):
    """A decoded update."""
    parameters = {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape if update.masks[name] is None else update.masks[name].shape),
            "mask": described_mask(update.masks[name]),
            "bits": hexadecimal(value),
        }
        for name, value in update.values.items()
    }
    buffers = {
        name: {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "bits": hexadecimal(value),
        }
        for name, value in update.buffers.items()
    }
    return {
        "kind": update.kind,
        "absent": update.absent,
        "num_examples": update.num_examples,
        "mask_id": update.mask_id,
        "masks id": update.masks.id,
        "metrics": {name: value.hex() for name, value in update.metrics.items()},
        "parameters": parameters,
        "buffers": buffers,
    }


def described_masks(masks):
    """Shapes and masks of a mask set."""
    return {
        "shapes": {name: None if mask is None else list(mask.shape) for name, mask in masks.items()},
        "masks": {name: described_mask(mask) for name, mask in masks.items()},
    }


def described_schema(schema):
    """Name, dtype and shape of every tensor."""
    return {
        part: [[spec.name, str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs]
        for part, specs in (("parameters", schema.parameters), ("buffers", schema.buffers))
    }


def described_mask(mask):
    """Zeros and ones in row-major order."""
    return None if mask is None else "".join("01"[bit] for bit in mask.reshape(-1).tolist())


def hexadecimal(tensor):
    """The bits of every element, most significant first, without spaces."""
    size = tensor.element_size()
    words = tensor.reshape(-1).contiguous().view(CARRIERS[size]).tolist()
    return "".join((word % 256**size).to_bytes(size, "big").hex() for word in words)
