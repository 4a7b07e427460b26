"""Tables that pair the parameter names of two formats, read in both directions.

A row pairs two name templates with fields in braces, such as `visual.transformer.resblocks.{layer}.ln_1.{part}` and
`vision_model.encoder.layers.{layer}.layer_norm1.{part}`. A field on one side only tells of a change of layout: `{qkv}`
on our side cuts a fused tensor into three, `{expert}` on theirs stacks one tensor an expert into one.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import NamedTuple

import torch

from moeclip_hf.errors import ConversionError
from moeclip_hf.stored_weights import find_faults, is_finite, list_faults

Tensors = Mapping[str, torch.Tensor]

_FIELDS = {
    "key": r".+",
    "layer": r"\d{1,4}",
    "tap": r"\d{1,4}",
    "expert": r"\d{1,4}",
    "part": r"weight|bias",
    "qkv": r"q|k|v",
}
_QKV = ("q", "k", "v")


class Layout(NamedTuple):
    """How one tensor is laid out anew, in both directions."""

    to_ours: Callable[[torch.Tensor], torch.Tensor]
    to_theirs: Callable[[torch.Tensor], torch.Tensor]


def _transpose(matrix: torch.Tensor) -> torch.Tensor:
    # Of any rank: what is no matrix is refused by its shape, later.
    return matrix.transpose(0, -1).contiguous()


AS_IS = Layout(lambda tensor: tensor, lambda tensor: tensor)
# A matrix that multiplies from the right, where a linear layer's multiplies from the left.
TRANSPOSED = Layout(_transpose, _transpose)
# A convolution of kernel 1, which is a linear layer.
POINTWISE = Layout(lambda weight: weight.squeeze(-1), lambda weight: weight.unsqueeze(-1))


class Row(NamedTuple):
    """A pair of name templates and the layout between them."""

    theirs: str
    ours: str
    layout: Layout = AS_IS


class KeyTable:
    """
    All names of a format, paired with ours.

    Args:
        rows (`Row`): every name is described by the first row that fits it.
        ignored (`tuple[str, ...]`): regular expressions of names that hold no weights.
    """

    def __init__(self, *rows: Row, ignored: tuple[str, ...] = ()):
        self._theirs = [(_compile(row.theirs), row) for row in rows]
        self._ours = [(_compile(row.ours), row) for row in rows]
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def without_ignored(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Drop the names that hold no weights."""
        return {key: tensor for key, tensor in tensors.items() if not any(p.fullmatch(key) for p in self._ignored)}

    def their_name(self, ours: str) -> str:
        """The name on their side of a tensor that is one on both."""
        return next(iter(self.to_theirs({ours: torch.empty(0, 0)})))

    def to_ours(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Name and lay out anew, for our side; names of no row are left out."""
        ours: dict[str, torch.Tensor] = {}
        stacks: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            row, fields = _find(self._theirs, key)
            if row is None:
                continue
            tensor = row.layout.to_ours(tensor)
            if "{qkv}" in row.ours:
                pieces = tensor.chunk(3) if tensor.dim() else [tensor]
                for letter, piece in zip(_QKV, pieces, strict=False):
                    ours[row.ours.format(**fields, qkv=letter)] = piece.clone()
            elif "expert" in fields:
                stacks[row.ours.format(**fields)][int(fields["expert"])] = tensor
            else:
                ours[row.ours.format(**fields)] = tensor
        for key, experts in stacks.items():
            ours[key] = torch.stack([experts[expert] for expert in sorted(experts)])
        return ours

    def to_theirs(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Name and lay out anew, for their side; names of no row are left out."""
        theirs: dict[str, torch.Tensor] = {}
        pieces: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            row, fields = _find(self._ours, key)
            if row is None:
                continue
            if "qkv" in fields:
                pieces[row.theirs.format(**fields)][fields["qkv"]] = tensor
            elif "{expert}" in row.theirs:
                for expert, one in enumerate(tensor):
                    theirs[row.theirs.format(**fields, expert=expert)] = row.layout.to_theirs(one)
            else:
                theirs[row.theirs.format(**fields)] = row.layout.to_theirs(tensor)
        for key, piece in pieces.items():
            theirs[key] = torch.cat([piece[letter] for letter in _QKV])
        return theirs


def check_tensors(tensors: Tensors, expected: Tensors, source: str) -> None:
    """
    Refuse tensors that are not just what a model expects, in finite floating-point numbers.

    Args:
        tensors: those of a file, under its own names.
        expected: those of the model, under the same names, on any device (the meta device will do).
        source (`str`): names the file in the error.

    Raises:
        ConversionError: lists unknown, missing and misshapen entries, and those of another type or not finite.
    """
    refuse(source, find_faults(tensors, expected))
    refuse(source, {"non-finite": [key for key in sorted(tensors) if not is_finite(tensors[key])]})


def refuse(source: str, faults: Mapping[str, Iterable[str]]) -> None:
    """Raise a `ConversionError` that lists the faulty entries of each kind, if there are any."""
    if listed := list_faults(faults):
        raise ConversionError(f"{source} does not fit: {listed}.")


def find_indices(names: Iterable[str], prefix: str, field: str) -> dict[str, int]:
    """The names that begin with a template, each with its index in `field`."""
    pattern = _compile(prefix)
    return {name: int(match[field]) for name in names if (match := pattern.match(name))}


def count_indices(names: Iterable[str], prefix: str, field: str) -> int:
    """
    Count what names enumerate: one more than the largest index of [`find_indices`].

    No more than there are such names, so that a stray index does not ask for thousands of layers.
    """
    indices = find_indices(names, prefix, field).values()
    return min(max(indices, default=-1) + 1, len(indices))


def _compile(template: str) -> re.Pattern[str]:
    """Turn a name template into a regular expression with a named group a field."""
    parts = []
    for literal, field, _, _ in Formatter().parse(template):
        parts.append(re.escape(literal))
        if field is not None:
            parts.append(f"(?P<{field}>{_FIELDS[field]})")
    return re.compile("".join(parts))


def _find(patterns: list[tuple[re.Pattern[str], Row]], key: str) -> tuple[Row | None, dict[str, str]]:
    for pattern, row in patterns:
        if match := pattern.fullmatch(key):
            return row, match.groupdict()
    return None, {}
