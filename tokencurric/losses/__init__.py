"""Divergences as pure functions, ConsistencyLoss as a module, and both losses from hidden states."""

from tokencurric.losses.consistency import ConsistencyLoss as ConsistencyLoss
from tokencurric.losses.divergences import Divergence as Divergence
from tokencurric.losses.divergences import forward_kl as forward_kl
from tokencurric.losses.divergences import jensen_shannon as jensen_shannon
from tokencurric.losses.divergences import reverse_kl as reverse_kl
from tokencurric.losses.features import feature_distance as feature_distance
from tokencurric.losses.finite import FiniteLosses as FiniteLosses
from tokencurric.losses.fused import fused_cross_entropy as fused_cross_entropy
from tokencurric.losses.head import Head as Head
from tokencurric.losses.supervised import LossSums as LossSums
from tokencurric.losses.supervised import Taught as Taught
from tokencurric.losses.supervised import supervised_losses as supervised_losses
