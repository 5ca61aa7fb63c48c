"""Tensors in the files that the model of the config does not have: which of them may be left out of account.

A tensor that belongs to another part of a larger model changes nothing here. One that stands next to a weight of ours,
or scales it, does: whoever leaves it out computes with other numbers and never learns of it. Such names are refused, no
line advises to ignore them, and a pattern takes them only if it means them alone.
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
"""A part of a name that quantisation and adapters give to tensors."""
OTHER_PART = re.compile(
    r"vision|visual|audio|image|video|speech|talker|(^|_)mm_|multi_?modal|projector|aligner|tower"
    r"|draft|(^|_)mtp(_|$)|medusa|eagle|score|reward|critic|(^|_)v(alue)?_?head|classifier|qa_outputs",
    re.IGNORECASE,
)
"""Parts of larger models, and heads of other tasks, from which nothing comes into the next-token model."""
SUSPECT = re.compile(r"norm|embed|bias|position|adapter|(^|_)(ln|wpe|wte)(_|$)", re.IGNORECASE)
"""Parts of a name that a next-token model computes with, whatever they are called in full."""


@dataclasses.dataclass(frozen=True)
class ModelTensors:
    """The names of a model's tensors, and what the caller wants to have left out of account."""

    needed: frozenset[str]
    """Tensors that the model has."""
    ignore: tuple[str, ...]
    """Patterns that the caller gave."""

    @functools.cached_property
    def modules(self) -> frozenset[str]:
        """All beginnings of its names, up to a dot."""
        return frozenset(prefix for name in self.needed for prefix in _beginnings(name))

    @functools.cached_property
    def owners(self) -> frozenset[str]:
        """Its layers, and the modules that hold a tensor themselves."""
        layers = (re.match(r".*?\.\d+(?=\.)", name) for name in self.needed)
        return frozenset({layer[0] for layer in layers if layer} | {name.rpartition(".")[0] for name in self.needed})

    @functools.cached_property
    def wide(self) -> dict[str, list[str]]:
        """Patterns of the caller that fit tensors of the model, and those tensors."""
        fits = {pattern: sorted(name for name in self.needed if matches(name, (pattern,))) for pattern in self.ignore}
        return {pattern: names for pattern, names in fits.items() if names}

    def within(self, name: str) -> bool:
        """Whether a tensor stands inside a layer of the model, or next to one of its weights."""
        return any(prefix in self.owners for prefix in _beginnings(name))

    def foreign_part(self, name: str) -> str:
        """The beginning of a name up to where it leaves the names of the model."""
        return next((prefix for prefix in _beginnings(name) if prefix not in self.modules), name)

    def scales(self, name: str) -> bool:
        """Whether a name is one that quantisation or an adapter gives to what belongs to a weight."""
        other = not self.within(name) and OTHER_PART.search(self.foreign_part(name))
        return not other and any(SCALE.search(part) for part in name.split("."))

    def changes_numbers(self, name: str) -> bool:
        """Whether the model may compute something else without a tensor."""
        if self.within(name):
            return True
        part = self.foreign_part(name)
        if OTHER_PART.search(part):
            return False
        beyond = part.rpartition(".")[2].isdecimal()  # a layer behind the last one, whole
        return self.scales(name) or (not beyond and any(SUSPECT.search(word) for word in name.split(".")))

    def ignored(self, name: str) -> bool:
        """Whether the caller's patterns leave a tensor out of account.

        One that changes numbers is left out by a pattern that fits nothing of the model and, where the tensor stands
        within the model, spells out the last part of its name.
        """
        for pattern in self.ignore:
            if not matches(name, (pattern,)):
                continue
            spelled = pattern.rpartition(".")[2] == name.rpartition(".")[2]
            if not self.changes_numbers(name) or (pattern not in self.wide and (spelled or not self.within(name))):
                return True
        return False

    def advised(self, names: Iterable[str]) -> list[str]:
        """Patterns that fit these names and no tensor of the model."""
        parts = {name: self.foreign_part(name) for name in names}
        patterns = (glob.escape(part) + ("" if part == name else ".*") for name, part in parts.items())
        return list(dict.fromkeys(patterns))

    def too_wide(self, name: str) -> str:
        """What a caller is told of a pattern that fits a tensor and does not count."""
        wide = next((pattern for pattern in self.ignore if matches(name, (pattern,))), None)
        return "" if wide is None else f" (ignore={wide!r} is too wide to mean it)"


def refuse_quantised(names: Iterable[str], model: ModelTensors, where: pathlib.Path) -> None:
    """Refuses the tensors that belong to quantised weights.

    Raises:
      UserError: the first of them.
    """
    scales = [name for name in names if model.scales(name) and not model.ignored(name)]
    if scales:
        raise UserError(
            f"{where} holds {_counted(scales)}: its weights are quantised or adapted, and without these tensors other "
            f"numbers come out{model.too_wide(scales[0])}; take the checkpoint before that, in float32, bfloat16 or "
            "float16"
        )


def check(
    rest: list[str],
    model: ModelTensors,
    tensors: Tensors,
    where: pathlib.Path,
    kind: str,
    notify: Callable[[str], None],
) -> None:
    """Refuses tensors that nobody reads, unless they are ignored or the index does not name them.

    Args:
      rest: their names.
      model: what the model has, and what is ignored.
      tensors: all tensors of the checkpoint.
      where: the checkpoint.
      kind: its model_type.
      notify: receives a line about what is left out of account.

    Raises:
      UserError: a tensor that changes what the model computes, or that may be ignored and is not.
    """
    left_out = [name for name in rest if model.ignored(name)]
    unread = [name for name in rest if not model.ignored(name)]
    changing = [name for name in unread if model.changes_numbers(name)]
    if changing:
        raise UserError(
            f"{where} holds {_counted(changing)}, which a {kind} of this config does not have; it may change what the "
            f"model computes, so it is not left out{model.too_wide(changing[0])}; give the config.json that these "
            "weights were saved with"
        )
    unlisted = [name for name in unread if tensors[name].unlisted]
    unexpected = [name for name in unread if not tensors[name].unlisted]
    if unexpected:
        patterns = model.advised(unexpected)
        flags = " ".join(f"--ignore '{pattern}'" for pattern in patterns)
        raise UserError(
            f"{where} holds {_counted(unexpected)}, which a {kind} of this config does not have; "
            f"if the model is complete without, ignore them: ignore={patterns!r}, {flags}"
        )
    if unlisted:
        notify(f"{where}: {_counted(unlisted)}, which {tensors[unlisted[0]].unlisted} does not name, is not read")
    if left_out:
        notify(f"{where}: {len(left_out)} tensors are left out of account, among them {left_out[0]}")
    for pattern, names in model.wide.items():
        notify(f"{where}: ignore={pattern!r} also fits {_counted(names)}, which the model needs; they are read")


def _beginnings(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _counted(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
