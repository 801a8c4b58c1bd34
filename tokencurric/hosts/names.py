"""Every name that is looked up in other people's code."""

from tokencurric.hosts.lookups import Argument

CACHE = Argument("cache", "past_key_values")  # `cache` since transformers 5.24
MASK = Argument("attention_mask")
EMBEDS = Argument("inputs_embeds")
