"""LLaVA of random weights in the sizes that are measured."""

from dataclasses import dataclass, replace

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

IMAGE = 10  # token id of a visual token


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a row of the batch."""

    layers: int = 32
    width: int = 512
    heads: int = 8
    inner: int = 1376  # 11008 / 4096 of the width
    vocabulary: int = 4016  # makes the head 0.65 of a layer a position
    tower_layers: int = 6
    tower_width: int = 256
    tower_heads: int = 8
    side: int = 24  # patches
    text: int = 100
    supervised: int = 80
    batch: int = 1

    @property
    def visual(self) -> int:
        """Visual tokens of a row."""
        return self.side**2


def of_width(width: int) -> Shape:
    """The proportions of LLaVA-1.5-7B at another width, a multiple of 128."""
    small = Shape()
    by = width / small.width
    return replace(
        small,
        width=width,
        heads=width // 64,
        inner=round(by * small.inner),
        vocabulary=round(by * small.vocabulary),
        tower_width=width // 2,
        tower_heads=width // 64,
    )


LLAVA_7B = Shape(width=4096, heads=32, inner=11008, vocabulary=32064, tower_layers=24, tower_width=1024, tower_heads=16)


def make_config(shape: Shape) -> LlavaConfig:
    """What transformers makes a model of that shape from."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=shape.tower_width,
            intermediate_size=4 * shape.tower_width,
            num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads,
            image_size=14 * shape.side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=2048,
            pad_token_id=0,
        ),
        image_token_index=IMAGE,
        image_seq_length=shape.visual,
    )
