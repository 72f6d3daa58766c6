"""Layouts of released checkpoints: names and shapes there of each tensor of this package.

The releases of LocalMamba, Vim and VMamba use names of their own. Their plain models keep one
tensor per direction, where this package stacks them.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


class Source(NamedTuple):
    """Released names, in the order in which they are stacked, and the shape of each."""

    names: list[str]
    shape: list[int]


@dataclass(frozen=True)
class Layout:
    """A layout of checkpoints.

    Attributes:
        rules: Substitutions, in order, from a name of ours to the released one.
        branches: For layouts with one tensor a direction, the released names of a branch's
            parameters; `{k}` stands for the direction, `{b}` for nothing or `_b`.
    """

    rules: Sequence[Rule] = ()
    branches: dict[str, str] = field(default_factory=dict)

    def rename(self, name: str) -> str:
        """Returns the released name of a tensor that is not stacked."""
        for pattern, released in self.rules:
            name = re.sub(pattern, released, name)
        return name


OWN = Layout()

_PLAIN: list[Rule] = [
    (r"^blocks\.", "layers."),
    (r"^norm\.", "norm_f."),
    (r"\.alpha$", ".multi_scan.weights"),
]
LOCALVIM = Layout(
    _PLAIN,
    {
        "x_proj": "x_proj_{k}.weight",
        "dt_weight": "dt_proj_{k}.weight",
        "dt_bias": "dt_proj_{k}.bias",
        "A_log": "A_log_{k}",
        "D": "D_{k}",
        "conv_weight": "conv1d_{k}.weight",
        "conv_bias": "conv1d_{k}.bias",
    },
)
VIM = Layout(
    _PLAIN,
    {
        "x_proj": "x_proj{b}.weight",
        "dt_weight": "dt_proj{b}.weight",
        "dt_bias": "dt_proj{b}.bias",
        "A_log": "A{b}_log",
        "D": "D{b}",
        "conv_weight": "conv1d{b}.weight",
        "conv_bias": "conv1d{b}.bias",
    },
)
_HIERARCHICAL: list[Rule] = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.fc\.", "classifier.head."),
    # The release ends a stage with patch merging; here it begins the next one.
    (r"^stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.mixer\.conv\.", ".mixer.conv2d."),
    (r"\.mixer\.norm\.", ".mixer.out_norm."),
    (r"\.mixer\.attn\.", ".mixer.multi_scan.attn."),
    (r"\.mixer\.alpha$", ".mixer.multi_scan.weights"),
    (r"\.branches\.x_proj$", ".x_proj_weight"),
    (r"\.branches\.dt_(weight|bias)$", r".dt_projs_\1"),
    (r"\.branches\.A_log$", ".A_logs"),
    (r"\.branches\.D$", ".Ds"),
    (r"\.mixer\.", ".op."),
]
LOCALVMAMBA = Layout(_HIERARCHICAL)
VMAMBA = Layout(
    [
        *_HIERARCHICAL,
        (r"\.downsample\.norm\.", ".downsample.1."),
        (r"\.downsample\.reduction\.", ".downsample.2."),
    ]
)


def layout_of(names: Collection[str], layouts: Mapping[str, Layout]) -> Layout:
    """Recognizes the layout of a checkpoint: ours, or the first whose key is part of a name."""
    for part, layout in {".branches.": OWN, **layouts}.items():
        if any(part in name for name in names):
            return layout
    return OWN


def source_of(name: str, shape: Sequence[int], layout: Layout) -> Source:
    """Returns the released tensors that make up the tensor `name` of a model, of shape `shape`."""
    mixer, _, parameter = name.rpartition(".branches.")
    if parameter in layout.branches:
        each = list(shape[1:])
        if parameter == "conv_weight":
            each.insert(1, 1)
        template = f"{layout.rename(mixer)}.{layout.branches[parameter]}"
        return Source([template.format(k=k, b="_b" * k) for k in range(shape[0])], each)
    released = layout.rename(name)
    if released.endswith((".A_logs", ".Ds")):
        return Source([released], [shape[0] * shape[1], *shape[2:]])
    if released.endswith(".multi_scan.weights"):
        return Source([released], [*shape, 1, 1, 1])
    return Source([released], list(shape))
