"""Every setting of a run, with its default and its check. A value that cannot work is refused here.

A run is one `Config`, made of sections. Each section has a file: `model`, `heads`, `loss`, `data`, `optim`, `mesh`,
`training` (section `train`), `decode`, `lora` and `rl`. `arch` is the model with its heads. `trunk` says what a model
section must offer, for any kind of model. `run` checks that settings of different sections fit together. `text` writes
a config as JSON and reads it back.

Config files are Python files that define `config = Config(...)`. The command line overrides any field by its dotted
path (`--model.d_model 512`).
"""

from mtp_jax.config.arch import Arch as Arch
from mtp_jax.config.arch import check_divisible as check_divisible
from mtp_jax.config.arch import equal_parameter_layers as equal_parameter_layers
from mtp_jax.config.blt import BltConfig as BltConfig
from mtp_jax.config.data import DataConfig as DataConfig
from mtp_jax.config.decode import DecodeConfig as DecodeConfig
from mtp_jax.config.heads import FACTS as FACTS
from mtp_jax.config.heads import Family as Family
from mtp_jax.config.heads import FamilyFacts as FamilyFacts
from mtp_jax.config.heads import HeadsConfig as HeadsConfig
from mtp_jax.config.heads import families as families
from mtp_jax.config.lora import LoraConfig as LoraConfig
from mtp_jax.config.lora import adaptable as adaptable
from mtp_jax.config.loss import LossConfig as LossConfig
from mtp_jax.config.mesh import MeshConfig as MeshConfig
from mtp_jax.config.model import ModelConfig as ModelConfig
from mtp_jax.config.optim import OptimConfig as OptimConfig
from mtp_jax.config.patching import PatchRule as PatchRule
from mtp_jax.config.rl import RLConfig as RLConfig
from mtp_jax.config.run import Config as Config
from mtp_jax.config.text import differences as differences
from mtp_jax.config.text import flatten as flatten
from mtp_jax.config.text import from_json as from_json
from mtp_jax.config.text import override as override
from mtp_jax.config.text import to_json as to_json
from mtp_jax.config.training import TrainConfig as TrainConfig
from mtp_jax.config.trunk import SECTIONS as SECTIONS
from mtp_jax.config.trunk import TrunkConfig as TrunkConfig
