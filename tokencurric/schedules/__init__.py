"""Values that change with training: pure functions of progress, for ratios, margins and layers alike."""

from tokencurric.schedules.clipped import Clipped as Clipped
from tokencurric.schedules.constant import Constant as Constant
from tokencurric.schedules.cosine import Cosine as Cosine
from tokencurric.schedules.joined import Joined as Joined
from tokencurric.schedules.linear import Linear as Linear
from tokencurric.schedules.protocol import Schedule as Schedule
from tokencurric.schedules.step import Step as Step
