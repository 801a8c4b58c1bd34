"""What compression has to know about a model, and how the author of one that is not from transformers says it."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class ModelAdapter(Protocol):
    """Names the parts of a model that is not from transformers. Inherit from it and say what differs.

    The model embeds text and visual tokens into one sequence, runs it through `layers`, each called with the hidden
    states first and whatever else it takes by name or in place, and applies `norm` to what the last one returns.
    Nothing in the model is changed: `compress` and `EPIC` put hooks on these modules.

    `inputs` are the arguments of the model's own forward, by name; `arguments` are those of one layer, without the
    hidden states.

    Args:
        model: the module whose forward is compressed, without wrappers such as DDP: the one that `compress` or `EPIC`
            is given, or a module of it.
        layers: its decoder layers, each a module of its own. One that returns a tuple returns the hidden states first.
        norm: what is applied to the last layer's output.
        head: hidden states to logits; None if there is none, which rules out `EPIC`.
        decoder: the module that runs the layers, where something calls it without the model's forward, as a `generate`
            written by hand does. None if the model's forward is always called. `inputs` are then the arguments of the
            decoder and, in a call of the model, those of the model, which win.
        aligned: the layers' arguments that have an entry for each token (a tensor, or a tuple of them), and the axis of
            tokens; masks and caches are not among them. Axis 0 has to be the batch, of its size or of size 1.
        caches: names of the layers' arguments that are a cache in a list, tuple or dict; they are not shortened.

    Example:
        >>> class Mine(ModelAdapter):
        ...     def __init__(self, model):
        ...         self.model, self.layers, self.norm, self.head = model, model.blocks, model.norm, model.head
        ...
        ...     def visual_mask(self, inputs):
        ...         return inputs["ids"] == 7
        ...
        ...     def mask_arguments(self, sees, hidden, arguments):
        ...         return {"mask": sees}
        >>> with compress(model, Uniform(), keep=16, layer=2, adapter=Mine):  # doctest: +SKIP
        ...     model(ids, pixels)

    `examples/custom_mllm.py` is a whole one.
    """

    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module | None
    decoder: nn.Module | None = None
    aligned: ClassVar[Mapping[str, int]] = {}
    caches: ClassVar[Collection[str]] = ()

    def visual_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
        """Which positions of the sequence that the layers see are visual tokens.

        Left out, the mask is given to each `compress(..., visual_mask=...)`, and to `EPIC` in the batch.
        """
        raise NotImplementedError

    def padding_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"] | None:
        """True at tokens and False at padding; None where there is no padding.

        In a call on a cache its last columns are the new tokens; it may also hold those before.
        """
        return None

    def token_ids(self, inputs: Mapping[str, Any]) -> Int[Tensor, "batch seq"] | None:
        """What tells rows apart, for compressors that draw; None tells them apart by their length alone."""
        return None

    def sees(
        self, query: Int[Tensor, "#batch 1 query 1"], key: Int[Tensor, "#batch 1 1 key"]
    ) -> Bool[Tensor, "#batch 1 query key"]:
        """The mask rule on positions of the full sequence: may `query` look at `key`? Causal unless overridden."""
        return query >= key

    def mask_arguments(
        self,
        sees: Bool[Tensor, "batch 1 query key"],
        hidden: Float[Tensor, "batch query dim"],
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """The layers' arguments that carry a mask, for this one.

        A layer that takes no mask and is causal by itself may return {} as long as rows keep equal numbers of tokens
        and have no padding. `sees` may be reshaped to what a layer takes: `sees[:, 0]` is [batch query key], and
        `sees[:, 0, -1]` a mask over keys [batch key] for a layer that is causal by itself, since the last query sees
        every token. A mask [query key] for all rows, `sees[0, 0]`, is refused where rows keep different tokens.

        Args:
            sees: [batch 1 query key] the rule, without padding, dropped tokens and fillers.
            hidden: [batch query dim] input of the layer.
            arguments: other arguments of the layer by name.

        Returns:
            New values by name; they replace what the layer was called with.
        """
        raise NotImplementedError

    def query_and_keys(
        self, layer: nn.Module, hidden: Float[Tensor, "batch seq dim"], arguments: dict[str, Any]
    ) -> tuple[Float[Tensor, "batch heads seq head_dim"], Float[Tensor, "batch kv_heads seq head_dim"]] | None:
        """Queries and keys of a layer's attention as its softmax sees them, after rotary embedding, before scaling.

        None where they are not to be had, which rules out compressors that need them. Products are divided by
        √head_dim.

        Rotated keys depend on the position, and `DART` ranks by them. A row keeps the same tokens with any padding if
        the model counts positions from each row's first token, and not over the padding before it.
        """
        return None

    def cache(self, inputs: Mapping[str, Any]) -> Any:
        """What keeps keys and values from call to call, as a call brings it in; None where it brings none.

        Any object, list, tuple or dict that holds the keys and values of each layer; layers may also fill a new one in
        each step (`returned_cache`). Which tokens its short layers lack is noted on the object or, where that takes no
        attribute, on the tensors inside, so both have to be the same ones in the next call. Positions of new tokens
        have to be counted from layer 0, or be given: higher layers hold fewer.
        """
        return None

    def returned_cache(self, output: Any) -> Any:
        """The cache in what the model, or `decoder` if it is set, returned; None if it returns none.

        Override it where the forward makes the cache, or makes a new one in each step.
        """
        return None

    def cached(self, cache: Any, layer: int) -> int:
        """Number of tokens of which `cache` holds keys of `layer`; layers above a cut hold fewer."""
        raise NotImplementedError

    def training_inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments that `EPIC` calls the model with, from its batch without `labels`: by default just these.

        `EPIC` makes the loss where the head is called, so a model that calls its head only with targets needs some. The
        head then returns one logit, shape [1 1 1], and what the model makes of it is not used: targets of shape [1 1]
        that are all 0 do for a cross-entropy.
        """
        return inputs
