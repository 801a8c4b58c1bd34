"""Files of conversations to batches: read and check, look before training, open pictures, order rows, collate.

Reading and `preflight` need no more than the core; pictures need pillow, collators need transformers.
"""

from tokencurric.data.collator import ConversationCollator as ConversationCollator
from tokencurric.data.conversations import MARK as MARK
from tokencurric.data.conversations import Conversation as Conversation
from tokencurric.data.conversations import ConversationFile as ConversationFile
from tokencurric.data.conversations import EmbeddedImage as EmbeddedImage
from tokencurric.data.conversations import Problem as Problem
from tokencurric.data.conversations import Turn as Turn
from tokencurric.data.dataset import ConversationDataset as ConversationDataset
from tokencurric.data.decoding import ImageDecoding as ImageDecoding
from tokencurric.data.grouping import GroupedSampler as GroupedSampler
from tokencurric.data.grouping import padding_share as padding_share
from tokencurric.data.preflight import Preflight as Preflight
from tokencurric.data.preflight import preflight as preflight
from tokencurric.data.prompts import PromptCollator as PromptCollator
from tokencurric.data.prompts import Prompts as Prompts
from tokencurric.data.reading import read_conversations as read_conversations
from tokencurric.data.sample import Sample as Sample
from tokencurric.data.sizes import RowSizes as RowSizes
from tokencurric.data.sizes import measure_rows as measure_rows
from tokencurric.data.template import VICUNA_V1 as VICUNA_V1
from tokencurric.data.template import choose_template as choose_template
