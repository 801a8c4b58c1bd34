"""What compression has to know about a model, and how the author of one that is not from transformers says it."""

from collections.abc import Mapping
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
        model: the model itself, without wrappers such as DDP.
        layers: its decoder layers. norm: what is applied to the last one's output. head: hidden states to logits; None
            if there is none, which rules out `EPIC`.
        aligned: the layers' arguments that have an entry for each token (a tensor, or a tuple of them), and the axis of
            tokens; masks and caches are not among them. Axis 0 has to be the batch, of its size or of size 1.

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
    aligned: ClassVar[Mapping[str, int]] = {}

    def visual_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"]:
        """Which positions of the sequence that the layers see are visual tokens."""
        raise NotImplementedError

    def padding_mask(self, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch seq"] | None:
        """True at tokens and False at padding; None where there is no padding."""
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
        and have no padding.

        Args:
            sees: the rule, without padding, dropped tokens and fillers. hidden: of the layer. arguments: of the layer.
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
        """The object that keeps keys and values from call to call; None where this call has none.

        It is given an attribute, so it has to be an object that takes one, not a bare list.
        """
        return None

    def cached(self, cache: Any, layer: int) -> int:
        """Number of tokens of which `cache` holds keys of `layer`."""
        raise NotImplementedError
