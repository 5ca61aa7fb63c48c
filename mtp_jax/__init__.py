"""Multi-token prediction in JAX: train extra heads, draft with them, verify with the model.

Each name is imported when it is first used, so that `import mtp_jax` takes little longer than `import jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_jax.accelerate.plan import HeadTraining as HeadTraining
    from mtp_jax.accelerate.whole import train_heads as train_heads
    from mtp_jax.config import Arch as Arch
    from mtp_jax.config import BltConfig as BltConfig
    from mtp_jax.config import Config as Config
    from mtp_jax.config import DataConfig as DataConfig
    from mtp_jax.config import DecodeConfig as DecodeConfig
    from mtp_jax.config import HeadsConfig as HeadsConfig
    from mtp_jax.config import LoraConfig as LoraConfig
    from mtp_jax.config import LossConfig as LossConfig
    from mtp_jax.config import MeshConfig as MeshConfig
    from mtp_jax.config import ModelConfig as ModelConfig
    from mtp_jax.config import OptimConfig as OptimConfig
    from mtp_jax.config import PatchRule as PatchRule
    from mtp_jax.config import RLConfig as RLConfig
    from mtp_jax.config import TrainConfig as TrainConfig
    from mtp_jax.config import equal_parameter_layers as equal_parameter_layers
    from mtp_jax.config import override as override
    from mtp_jax.convert.adapter_reader import with_adapter as with_adapter
    from mtp_jax.convert.adapter_writer import export_adapter as export_adapter
    from mtp_jax.convert.heads_file import with_heads as with_heads
    from mtp_jax.convert.heads_file import write_heads as write_heads
    from mtp_jax.convert.importer import import_model as import_model
    from mtp_jax.convert.starting import start_from as start_from
    from mtp_jax.convert.writer import export_model as export_model
    from mtp_jax.decode.conversation import Conversation as Conversation
    from mtp_jax.decode.drafters import DraftContext as DraftContext
    from mtp_jax.decode.drafters import Drafter as Drafter
    from mtp_jax.decode.drafters import Drafts as Drafts
    from mtp_jax.decode.generate import generate as generate
    from mtp_jax.decode.generate import stream as stream
    from mtp_jax.decode.hooks import Hook as Hook
    from mtp_jax.decode.hooks import HookContext as HookContext
    from mtp_jax.decode.hooks import HookMaker as HookMaker
    from mtp_jax.decode.options import Options as Options
    from mtp_jax.decode.proxy import ProxyTuning as ProxyTuning
    from mtp_jax.decode.scoring import Score as Score
    from mtp_jax.decode.scoring import score as score
    from mtp_jax.decode.soft_thinking import SoftThinking as SoftThinking
    from mtp_jax.decode.verify import Rule as Rule
    from mtp_jax.errors import UserError as UserError
    from mtp_jax.eval.marginals import Marginals as Marginals
    from mtp_jax.eval.marginals import marginals as marginals
    from mtp_jax.eval.page import write_page as write_page
    from mtp_jax.eval.report import evaluate as evaluate
    from mtp_jax.loading import LoadedModel as LoadedModel
    from mtp_jax.loading import load as load
    from mtp_jax.rl.loop import reinforce as reinforce
    from mtp_jax.runs.metrics import read_metrics as read_metrics
    from mtp_jax.training.loop import train as train

__version__ = "0.1.0"

_HOMES = {
    "Arch": "config",
    "Config": "config",
    "ModelConfig": "config",
    "BltConfig": "config",
    "PatchRule": "config",
    "HeadsConfig": "config",
    "LossConfig": "config",
    "LoraConfig": "config",
    "RLConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "MeshConfig": "config",
    "TrainConfig": "config",
    "DecodeConfig": "config",
    "equal_parameter_layers": "config",
    "override": "config",
    "UserError": "errors",
    "load": "loading",
    "LoadedModel": "loading",
    "generate": "decode.generate",
    "stream": "decode.generate",
    "Conversation": "decode.conversation",
    "Drafter": "decode.drafters",
    "DraftContext": "decode.drafters",
    "Drafts": "decode.drafters",
    "Hook": "decode.hooks",
    "HookContext": "decode.hooks",
    "HookMaker": "decode.hooks",
    "ProxyTuning": "decode.proxy",
    "SoftThinking": "decode.soft_thinking",
    "Options": "decode.options",
    "Score": "decode.scoring",
    "score": "decode.scoring",
    "Rule": "decode.verify",
    "evaluate": "eval.report",
    "marginals": "eval.marginals",
    "Marginals": "eval.marginals",
    "write_page": "eval.page",
    "read_metrics": "runs.metrics",
    "train": "training.loop",
    "reinforce": "rl.loop",
    "train_heads": "accelerate.whole",
    "HeadTraining": "accelerate.plan",
    "start_from": "convert.starting",
    "import_model": "convert.importer",
    "with_heads": "convert.heads_file",
    "write_heads": "convert.heads_file",
    "export_model": "convert.writer",
    "export_adapter": "convert.adapter_writer",
    "with_adapter": "convert.adapter_reader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtp_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mtp_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
