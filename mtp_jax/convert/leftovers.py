"""Decides which tensors in the files may be ignored, if the model of the config does not have them.

A tensor that belongs to another part of a larger model changes nothing here. But a tensor that is next to one of the
model's weights, or scales it, does: without it, the model would silently compute other numbers. Such a tensor is
refused. No error advises to ignore it, and a pattern ignores it only if it fits no tensor of the model.
"""

import dataclasses
import functools
import glob
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from mtp_jax.convert.files import Tensors, matches
from mtp_jax.errors import UserError

SCALE = re.compile(
    r"(^|_)(scales?|zeros?|zero_points?|absmax|amax|codebooks?|scb)(_|$)|^q(weight|zeros)$|^g_idx$|quant|^codes$|^biases$"
    r"|^weight_(packed|shape|format)$|^wf_unpacked$|^lora_",
    re.IGNORECASE,
)
"""Matches words in the tensor names of quantised weights and adapters."""
OTHER_PART = re.compile(
    r"vision|visual|audio|image|video|speech|talker|(^|_)mm_|multi_?modal|projector|aligner|tower"
    r"|draft|(^|_)mtp(_|$)|medusa|eagle|score|reward|critic|(^|_)v(alue)?_?head|classifier|qa_outputs",
    re.IGNORECASE,
)
"""Matches names of other parts of larger models and of heads for other tasks. The trunk does not depend on them."""
SUSPECT = re.compile(r"norm|embed|bias|position|adapter|(^|_)(ln|wpe|wte)(_|$)", re.IGNORECASE)
"""Matches words in the names of tensors that a trunk may compute with."""


@dataclasses.dataclass(frozen=True)
class ModelTensors:
    """The names of a model's tensors, and the patterns of tensors that the caller wants to ignore."""

    needed: frozenset[str]
    """Names of the tensors that the model has."""
    ignore: tuple[str, ...]
    """Patterns from the caller."""

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All prefixes of its names that end before a dot."""
        return frozenset(prefix for name in self.needed for prefix in _beginnings(name))

    @functools.cached_property
    def owners(self) -> frozenset[str]:
        """Its layers, and the modules that directly hold a tensor."""
        layers = (re.match(r".*?\.\d+(?=\.)", name) for name in self.needed)
        return frozenset({layer[0] for layer in layers if layer} | {name.rpartition(".")[0] for name in self.needed})

    @functools.cached_property
    def wide(self) -> dict[str, list[str]]:
        """Patterns of the caller that match tensors of the model, and these tensors."""
        fits = {pattern: sorted(name for name in self.needed if matches(name, (pattern,))) for pattern in self.ignore}
        return {pattern: names for pattern, names in fits.items() if names}

    def within(self, name: str) -> bool:
        """Whether a tensor is inside a layer of the model, or in the same module as one of its weights."""
        return any(prefix in self.owners for prefix in _beginnings(name))

    def foreign_part(self, name: str) -> str:
        """The shortest prefix of a name that is not a module of the model."""
        return next((prefix for prefix in _beginnings(name) if prefix not in self.modules), name)

    def scales(self, name: str) -> bool:
        """Whether a name is that of a tensor of quantised weights or of an adapter."""
        other = not self.within(name) and OTHER_PART.search(self.foreign_part(name))
        return not other and any(SCALE.search(part) for part in name.split("."))

    def changes_numbers(self, name: str) -> bool:
        """Whether the model may compute different results without a tensor."""
        if self.within(name):
            return True
        part = self.foreign_part(name)
        if OTHER_PART.search(part):
            return False
        beyond = part.rpartition(".")[2].isdecimal()  # a whole layer after the last one
        return self.scales(name) or (not beyond and any(SUSPECT.search(word) for word in name.split(".")))

    def ignored(self, name: str) -> bool:
        """Whether a pattern of the caller ignores a tensor.

        If the tensor changes results, the pattern must not match any tensor of the model. If the tensor is within the
        model, the pattern must also contain the last part of its name in full.
        """
        for pattern in self.ignore:
            if not matches(name, (pattern,)):
                continue
            spelled = pattern.rpartition(".")[2] == name.rpartition(".")[2]
            if not self.changes_numbers(name) or (pattern not in self.wide and (spelled or not self.within(name))):
                return True
        return False

    def advised(self, names: Iterable[str]) -> list[str]:
        """Patterns that match these names and no tensor of the model."""
        parts = {name: self.foreign_part(name) for name in names}
        patterns = (glob.escape(part) + ("" if part == name else ".*") for name, part in parts.items())
        return list(dict.fromkeys(patterns))

    def too_wide(self, name: str) -> str:
        """A remark on a pattern that matches a tensor but does not ignore it; "" if there is none."""
        wide = next((pattern for pattern in self.ignore if matches(name, (pattern,))), None)
        return "" if wide is None else f" (ignore={wide!r} is too wide to include it)"


def refuse_quantised(names: Iterable[str], model: ModelTensors, where: pathlib.Path) -> None:
    """Refuses tensors of quantised weights and adapters.

    Raises:
      UserError: there is such a tensor. The error names the first one.
    """
    scales = [name for name in names if model.scales(name) and not model.ignored(name)]
    if scales:
        raise UserError(
            f"{where} holds {_counted(scales)}: its weights are quantised or adapted, and without these tensors the "
            f"model computes other numbers{model.too_wide(scales[0])}; use the checkpoint before that, in float32, "
            "bfloat16 or float16"
        )


def check(
    rest: list[str],
    model: ModelTensors,
    tensors: Tensors,
    where: pathlib.Path,
    kind: str,
    notify: Callable[[str], None],
) -> None:
    """Refuses tensors that are not read, unless they are ignored or the index does not list them.

    Args:
      rest: names of the tensors that are not read.
      model: the tensors of the model, and the patterns to ignore.
      tensors: all tensors of the checkpoint.
      where: the checkpoint.
      kind: its model_type.
      notify: is called with lines of text about ignored tensors.

    Raises:
      UserError: a tensor may change what the model computes, or is harmless but not ignored by the caller.
    """
    left_out = [name for name in rest if model.ignored(name)]
    unread = [name for name in rest if not model.ignored(name)]
    changing = [name for name in unread if model.changes_numbers(name)]
    if changing:
        raise UserError(
            f"{where} holds {_counted(changing)}, which a {kind} of this config does not have; it may change what the "
            f"model computes, so it cannot be ignored{model.too_wide(changing[0])}; give the config.json that these "
            "weights were saved with"
        )
    unlisted = [name for name in unread if tensors[name].unlisted]
    unexpected = [name for name in unread if not tensors[name].unlisted]
    if unexpected:
        patterns = model.advised(unexpected)
        flags = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        raise UserError(
            f"{where} holds {_counted(unexpected)}, which a {kind} of this config does not have; "
            f"if the model is complete without them, ignore them: ignore={patterns!r}, {flags}"
        )
    if unlisted:
        notify(f"{where}: {_counted(unlisted)}, which {tensors[unlisted[0]].unlisted} does not name, is not read")
    if left_out:
        notify(f"{where}: {len(left_out)} tensors are ignored, among them {left_out[0]}")
    for pattern, names in model.wide.items():
        notify(f"{where}: ignore={pattern!r} also matches {_counted(names)}, which the model needs; they are read")


def _beginnings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _counted(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
