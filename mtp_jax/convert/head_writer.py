"""Writes heads for export: chooses their form, and writes the config fields and files that belong to it."""

import dataclasses
import json
import pathlib
from typing import Any

from mtp_jax.config import FACTS, Arch, ModelConfig
from mtp_jax.convert import forms, meta, record
from mtp_jax.convert.files import Entry, write_file
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.origin import Origin
from mtp_jax.errors import UserError
from mtp_jax.model.heads.base import sets

FITTING = {
    "sequential": ("mtp", "mimo", "eagle"),
    "recursive": ("eagle", "mtp", "qwen"),
    "medusa": ("vllm", "caft"),
    "parallel": ("caft",),
}
"""Default forms for the heads of a family. The first one that can hold the heads is used."""


def choose_form(arch: Arch, origin: Origin | None, form: str | None) -> str:
    """The form that the heads are written in; "" if no heads are written."""
    heads = arch.heads
    if form not in (None, "none", *forms.FORMS):
        raise UserError(f"form={form!r} is unknown; choose one of {', '.join(forms.FORMS)}, none")
    if heads.num_future == 1 and form not in (None, "none"):
        raise UserError(f"form={form!r}, but the model has no extra heads; leave it out")
    if heads.num_future == 1 or form == "none":
        return ""
    came = origin.form if origin is not None else ""
    if heads.draft_vocab:
        raise UserError(
            f"heads.draft_vocab={heads.draft_vocab}: no form can hold heads with a draft vocabulary; use form 'none' "
            "to write the model without heads"
        )
    # If the record of the import changed settings of the form, the record of the export has these settings, too.
    if came and form in (None, came) and (_as_it_came(arch, origin) or not _misfit(forms.FORMS[came], arch)):
        return came
    if form is None:
        wanted = (origin.wanted,) if origin is not None and origin.wanted else ()
        usual = FITTING.get(heads.kind, ())
        fitting = [name for name in (*wanted, *usual) if not _misfit(forms.FORMS[name], arch)]
        form = next(iter((*fitting, *usual)), None)
    if form is None:
        remedy = "use form 'none' to write the model without heads"
        raise UserError(f"heads.kind={heads.kind!r} has no form that other projects read; {remedy}")
    if misfit := _misfit(forms.FORMS[form], arch):
        by_meta = "'meta' (Meta's layout, which no server reads) or " if _meta_holds(arch) else ""
        remedy = f"use form {by_meta}'none' (without heads), or heads that `mtp import --form` made"
        raise UserError(f"the form {form!r} cannot hold these heads: {misfit}; {remedy}")
    return form


def _meta_holds(arch: Arch) -> bool:
    """Whether Meta's layout can hold a model with these heads."""
    if _misfit(forms.FORMS["meta"], arch):
        return False
    try:
        meta.describe(arch, None)
    except UserError:
        return False
    return True


def _as_it_came(arch: Arch, origin: Origin | None) -> bool:
    """Whether the heads have the settings of the heads that the model was imported with."""
    return origin is not None and dataclasses.asdict(arch.heads) == origin.heads


def _misfit(form: forms.Form, arch: Arch) -> str:
    """Why a form cannot hold these heads; "" if it can."""
    heads = arch.heads
    expected = form.heads(arch.model)
    kinds = form.kinds
    if heads.kind not in kinds:
        return f"it holds {' or '.join(kinds)} heads, not {heads.kind}"
    if form.modules and sets(arch) > form.modules:
        return f"it holds one module, not {sets(arch)}"
    if form.name == "mtp" and sets(arch) > arch.model.num_layers:
        return f"transformers reads more heads than the model's {arch.model.num_layers} layers as layers"
    if any(FACTS[kind].chains_tokens for kind in kinds) and (why := _unlike_llama(arch.model)):
        return why
    expected.pop("kind", None)
    tap = expected.pop("tap")
    tap = tap if tap >= 0 else arch.model.num_layers + tap
    if arch.tap != tap:
        return f"its heads read the state after block {tap}, not {arch.tap}"
    free = {*form.free, *(("chain",) if heads.num_future == 2 else ())}
    fields = ("tap_norm", "tap_mix", "norm", "unembed", "norm_plus_one", "concat", "chain", "input_norm", "layers")
    fields += ("attention",)
    plain = type(heads)(kind=heads.kind, num_future=heads.num_future)
    for name in fields:
        want = expected.get(name, getattr(plain, name))
        have = getattr(heads, name)
        if want != have and name not in free:
            return f"it has heads.{name}={want!r}, not {have!r}"
    return ""


def _unlike_llama(model: ModelConfig) -> str:
    """A feature of the model that other projects do not build into sequential heads; "" if there is none."""
    if model.norm == "layer":
        return "other projects build these heads with RMSNorm, but the model has LayerNorm"
    for name in ("residual_scale", "logit_scale"):
        if getattr(model, name) != 1:
            return f"other projects build these heads without model.{name}={getattr(model, name)}"
    if "nope" in model.layers:
        return "other projects build these heads with positions in every layer, but the model has layers without"
    return ""


def write_beside(directory: pathlib.Path, form: str, arch: Arch, entries: list[Entry], trunk: dict[str, Any]) -> None:
    """Writes a directory `heads` next to the weights, in the layout that readers of this form expect."""
    model = arch.model
    heads = arch.heads
    target = directory / "heads"
    target.mkdir()
    names = {"medusa": "medusa_lm_head.safetensors", "caft": "heads.safetensors"}
    write_file(target / names.get(form, "model.safetensors"), entries)
    fields = {
        "vllm": {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": model.d_model,
            "vocab_size": model.vocab_size,
            "num_heads": heads.num_future - 1,
            "num_hidden_layers": heads.layers,
            "medusa_fc_bias": True,
            "original_lm_head": False,
        },
        "medusa": {
            "medusa_num_heads": heads.num_future - 1,
            "medusa_num_layers": heads.layers,
            "base_model_name_or_path": "..",
        },
        "eagle": trunk | {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1, "add_para_norm": True},
    }
    if form in fields:
        (target / "config.json").write_text(json.dumps(fields[form], indent=2) + "\n")
    (target / record.RECORD).write_text(record.text(form, arch))


def repeated(entry: Architecture, arch: Arch, origin: Origin | None, form: str) -> dict[str, str]:
    """Tensors that repeat another one: as in the import, but without those of heads that are no longer there."""
    came = origin.repeated if origin is not None else {}
    heads = forms.repeats(forms.FORMS[form], entry, arch) if form else {}
    if origin is not None and origin.form == form and _as_it_came(arch, origin):
        heads = {name: theirs for name, theirs in heads.items() if name in came}
    return {name: theirs for name, theirs in came.items() if name == entry.unembed} | heads
