"""Multi-token prediction in JAX: train extra heads, draft with them, verify with the model.

Names are imported at first use, so that `import mtp_jax` costs little more than `import jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_jax.config import (
        Config as Config,
    )

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "ModelConfig": "config",
    "HeadsConfig": "config",
    "LossConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "MeshConfig": "config",
    "TrainConfig": "config",
    "DecodeConfig": "config",
    "equal_parameter_layers": "config",
    "UserError": "errors",
    "load": "load",
    "LoadedModel": "load",
    "generate": "decode.generate",
    "stream": "decode.generate",
    "Drafter": "decode.drafters",
    "train": "train.loop",
    "evaluate": "eval.report",
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
