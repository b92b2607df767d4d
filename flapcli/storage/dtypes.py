"""The one table of dtypes: safetensors' codes, torch's names, bytes of an item. Torch is imported when asked for."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

StoredDtype = Literal["float32", "bfloat16", "float16"]  # what apply writes
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # what a model runs in
# Code in a safetensors header: (name of the torch dtype, bytes of an item).
TABLE = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}  # fmt: skip
ITEM_SIZE = {code: size for code, (_, size) in TABLE.items()}
CODES = {name: code for code, (name, _) in TABLE.items()}
SLICED = ("F64", "F32", "BF16", "F16")  # what weights may be stored in to be pruned


def torch_dtype(which: str) -> "torch.dtype":
    """The torch dtype of a code (`BF16`) or of a name (`bfloat16`)."""
    import torch

    dtype = getattr(torch, TABLE[which][0] if which in TABLE else which)
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """Its name as options and artifacts write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def has_code(dtype: "torch.dtype") -> bool:
    """Whether safetensors headers have a code for it that flap reads."""
    return dtype_name(dtype) in CODES


def dtype_code(dtype: "torch.dtype") -> str:
    """Its code in a safetensors header."""
    return CODES[dtype_name(dtype)]
