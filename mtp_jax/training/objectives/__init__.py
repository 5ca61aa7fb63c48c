"""The objective of a run: computes the loss and its sums from a config, the parameters and a batch.

The functions in `losses/` know only arrays. This package connects them with the model and the config.

    spec      the options of the losses, and the weights of heads over the run
    targets   the targets of every head, with their weights
    heads     the losses of the heads
    regions   the loss of a standalone model, in the place of those of heads
    terms     what is added to them: `Term`
    total     all of it
"""

from mtp_jax.training.objectives.heads import hidden_states as hidden_states
from mtp_jax.training.objectives.heads import loss_sums as loss_sums
from mtp_jax.training.objectives.heads import selected as selected
from mtp_jax.training.objectives.regions import region_loss as region_loss
from mtp_jax.training.objectives.regions import scales as scales
from mtp_jax.training.objectives.spec import entropy_options as entropy_options
from mtp_jax.training.objectives.spec import head_schedule as head_schedule
from mtp_jax.training.objectives.spec import xent_spec as xent_spec
from mtp_jax.training.objectives.targets import DRAWS as DRAWS
from mtp_jax.training.objectives.targets import Batch as Batch
from mtp_jax.training.objectives.targets import Targets as Targets
from mtp_jax.training.objectives.targets import batch_targets as batch_targets
from mtp_jax.training.objectives.targets import drawn as drawn
from mtp_jax.training.objectives.targets import inputs as inputs
from mtp_jax.training.objectives.targets import random_draws as random_draws
from mtp_jax.training.objectives.targets import token_weights as token_weights
from mtp_jax.training.objectives.terms import Objective as Objective
from mtp_jax.training.objectives.terms import Seen as Seen
from mtp_jax.training.objectives.terms import Term as Term
from mtp_jax.training.objectives.terms import order_loss as order_loss
from mtp_jax.training.objectives.terms import terms_of as terms_of
from mtp_jax.training.objectives.total import Parts as Parts
from mtp_jax.training.objectives.total import total_loss as total_loss
