"""Models whose decoder and layers take their cache by a name of our choice, whatever the installed release calls it."""

from tests.adapters.zoo import tiny_model
from tokencurric.adapters import find_parts
from tokencurric.hosts.names import CACHE


class _Cached:
    """In front of a class of transformers: hooks see the cache as `name`, the class gets it as it wants it."""

    name: str

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **_renamed(kwargs, self.name))

    def _go_on(self, args, kwargs):
        native = CACHE.name_in(super().forward)
        return super().forward(*args, **_renamed(kwargs, native, also=self.name))


class _AsCache(_Cached):
    name = "cache"

    def forward(self, *args, attention_mask=None, inputs_embeds=None, cache=None, **kwargs):
        return self._go_on(args, kwargs | _given(attention_mask, inputs_embeds) | {"cache": cache})


class _AsPastKeyValues(_Cached):
    name = "past_key_values"

    def forward(self, *args, attention_mask=None, inputs_embeds=None, past_key_values=None, **kwargs):
        return self._go_on(args, kwargs | _given(attention_mask, inputs_embeds) | {"past_key_values": past_key_values})


class _AsMemory(_Cached):
    name = "memory"

    def forward(self, *args, attention_mask=None, inputs_embeds=None, memory=None, **kwargs):
        return self._go_on(args, kwargs | _given(attention_mask, inputs_embeds) | {"memory": memory})


RENAMED = {each.name: each for each in (_AsCache, _AsPastKeyValues, _AsMemory)}


def _given(mask, embeds):
    # A layer gets no embeddings, and must not get them as one argument more.
    return {"attention_mask": mask} | ({} if embeds is None else {"inputs_embeds": embeds})


def _renamed(kwargs, name, also=None):
    known = {*CACHE.names, also}
    return {name if each in known else each: value for each, value in kwargs.items()}


def rename_cache(model, name, *, decoder=True, layers=True):
    """Have hooks on the decoder, its layers or both see the cache as `name`; the model computes what it did."""
    parts = find_parts(model)
    for module in [*([parts.decoder] if decoder else []), *(parts.layers if layers else [])]:
        module.__class__ = type(type(module).__name__, (RENAMED[name], type(module)), {})
    return model


def renamed_model(family, name, *, attention="sdpa"):
    """A tiny model of `family` whose decoder and layers take their cache as `name`."""
    return rename_cache(tiny_model(family, attention=attention), name)
