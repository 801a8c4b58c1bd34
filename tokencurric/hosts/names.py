"""Every name that is looked up in other people's code, and examples that have it.

`check_release` walks all of them. A new look-up gets a line here, or a test fails that reads the library's source.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import cache

from tokencurric.errors import MissingDependencyError
from tokencurric.hosts.lookups import Argument, Attribute, Lookup, Override

_LLAMA = "transformers.models.llama.modeling_llama"
_QWEN3 = "transformers.models.qwen3_vl.modeling_qwen3_vl"
_LAYER, _DECODER, _ATTEND = f"{_LLAMA}.LlamaDecoderLayer", f"{_LLAMA}.LlamaModel", f"{_LLAMA}.eager_attention_forward"
_LLAVA, _LLAVA_MODEL = "transformers.LlavaForConditionalGeneration", "transformers.LlavaModel"
_QWEN = "transformers.Qwen2VLForConditionalGeneration"
_CACHES = ("transformers.DynamicCache", "transformers.StaticCache")
_CACHE_LAYERS = ("transformers.cache_utils.DynamicLayer", "transformers.cache_utils.DynamicSlidingWindowLayer")
_TRAINER = ("transformers.Trainer",)


def _calls(*owners: str) -> tuple[str, ...]:
    return tuple(f"{owner}.forward" for owner in owners)


# Arguments of decoders and layers that are checked on each model, too.
CACHE = Argument("cache", "past_key_values", on=_calls(_LAYER, _DECODER, _LLAVA))  # `cache` since transformers 5.24
MASK = Argument("attention_mask", on=(*_calls(_LAYER, _DECODER, _LLAVA), _ATTEND))
EMBEDS = Argument("inputs_embeds", on=_calls(_DECODER, _LLAVA))

_ARGUMENTS = (
    CACHE,
    MASK,
    EMBEDS,
    # Of models
    Argument("input_ids", on=_calls(_DECODER, _LLAVA, _QWEN)),
    Argument("labels", on=_calls(_LLAVA, _QWEN)),
    Argument("use_cache", on=_calls(_DECODER)),
    Argument("mm_encoder_outputs", on=(f"{_QWEN3}.Qwen3VLForConditionalGeneration.forward",)),
    Argument("pixel_values", on=_calls(_LLAVA, _QWEN)),
    Argument("pixel_attention_mask", on=("transformers.Idefics3Model.get_image_features",)),
    Argument("image_sizes", on=("transformers.LlavaNextModel.get_image_features",)),
    Argument("image_grid_thw", on=("transformers.Qwen2VLModel.get_image_features",)),
    Argument("inputs", on=("transformers.LlavaForConditionalGeneration.generate",)),
    # Of decoders and layers
    Argument("position_ids", on=_calls(_LAYER, _DECODER)),
    Argument("position_embeddings", on=_calls(_LAYER)),
    Argument("visual_pos_masks", on=_calls(f"{_QWEN3}.Qwen3VLTextModel")),
    Argument("deepstack_visual_embeds", on=_calls(f"{_QWEN3}.Qwen3VLTextModel")),
    # Of functions that compute attention
    Argument("scaling", on=(_ATTEND,)),
    Argument("s_aux", on=("transformers.integrations.flash_attention.flash_attention_forward",)),
    Argument("softcap", on=("transformers.models.gemma2.modeling_gemma2.eager_attention_forward",)),
)

_ATTRIBUTES = (
    # Of configs
    Attribute("image_token_id", ("transformers.Qwen2VLConfig",)),
    Attribute("image_token_index", ("transformers.LlavaConfig",)),
    Attribute("video_token_id", ("transformers.Qwen2VLConfig",)),
    Attribute("video_token_index", ("transformers.VideoLlavaConfig",)),
    Attribute("model_type", ("transformers.LlavaConfig",)),
    Attribute("is_encoder_decoder", ("transformers.PreTrainedConfig",)),
    Attribute("layer_types", ("transformers.Gemma3TextConfig", "transformers.Qwen2Config")),
    Attribute("sliding_window", ("transformers.Gemma3TextConfig", "transformers.MistralConfig")),
    Attribute("attention_chunk_size", ("transformers.Llama4TextConfig",)),
    Attribute("cross_attention_layers", ("transformers.models.mllama.configuration_mllama.MllamaTextConfig",)),
    Attribute("num_kv_shared_layers", ("transformers.Gemma3nTextConfig",)),
    Attribute("final_logit_softcapping", ("transformers.Gemma2Config",)),
    Attribute("logit_scale", ("transformers.CohereConfig",)),
    Attribute("logits_scaling", ("transformers.GraniteConfig",)),
    Attribute("_attn_implementation", ("transformers.PreTrainedConfig",)),
    Attribute("_attn_implementation_internal", ("transformers.PreTrainedConfig",)),
    Attribute("vision_config", ("transformers.LlavaConfig",)),
    Attribute("patch_size", ("transformers.CLIPVisionConfig",)),
    Attribute("image_size", ("transformers.CLIPVisionConfig",)),
    Attribute("num_channels", ("transformers.CLIPVisionConfig",)),
    Attribute("in_channels", ("transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",)),
    Attribute("temporal_patch_size", ("transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",)),
    Attribute(
        "spatial_merge_size",
        ("transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig", "transformers.Mistral3Config"),
    ),
    Attribute("image_grid_pinpoints", ("transformers.LlavaNextConfig",)),
    # Of models and their parts
    Attribute("config", ("transformers.PreTrainedModel", _DECODER)),
    Attribute("model", (_LLAVA,)),
    Attribute("layers", (_DECODER, *_CACHES)),
    Attribute("norm", (_DECODER,)),
    Attribute("self_attn", (_LAYER,)),
    Attribute("mlp", (_LAYER,)),
    Attribute("q_proj", (f"{_LLAMA}.LlamaAttention",)),
    Attribute("o_proj", (f"{_LLAMA}.LlamaAttention",)),
    Attribute("get_decoder", (_LLAVA, _LLAVA_MODEL)),
    Attribute("get_output_embeddings", (_LLAVA,)),
    Attribute("get_image_features", (_LLAVA_MODEL, "transformers.Qwen2VLModel")),
    Attribute("get_video_features", ("transformers.LlavaOnevisionModel", "transformers.Qwen2VLModel")),
    Attribute("eager_attention_forward", (_LLAMA,)),
    # Of generation
    Attribute("generate", (_LLAVA,)),
    Attribute("get_compiled_call", (_LLAVA,)),
    Attribute("generation_config", ("transformers.PreTrainedModel",)),
    Attribute("prefill_chunk_size", ("transformers.GenerationConfig",)),
    # Of outputs
    Attribute("last_hidden_state", ("transformers.modeling_outputs.BaseModelOutputWithPast",)),
    Attribute("loss", ("transformers.models.llava.modeling_llava.LlavaCausalLMOutputWithPast",)),
    Attribute("logits", ("transformers.models.llava.modeling_llava.LlavaCausalLMOutputWithPast",)),
    Attribute("pooler_output", ("transformers.modeling_outputs.BaseModelOutputWithPooling",)),
    Attribute("deepstack_features", (f"{_QWEN3}.BaseModelOutputWithDeepstackFeatures",)),
    # Of caches
    Attribute("get_seq_length", (*_CACHES, *_CACHE_LAYERS)),
    Attribute("get_mask_sizes", _CACHES),
    Attribute("update", _CACHES),
    Attribute("is_compileable", _CACHES),
    Attribute("is_sliding", _CACHE_LAYERS),
    Attribute("keys", _CACHE_LAYERS),
    # Of torch
    Attribute("_orig_mod", ("torch._dynamo.eval_frame.OptimizedModule",)),
    Attribute("module", ("torch.nn.parallel.DistributedDataParallel",)),
    Attribute("_compiled_call_impl", ("torch.nn.Module",)),
    Attribute("_forward_hooks", ("torch.nn.Module",)),
    Attribute("_forward_pre_hooks", ("torch.nn.Module",)),
    Attribute("_backward_hooks", ("torch.nn.Module",)),
    Attribute("_current_graph_task_id", ("torch._C",)),
    Attribute("_assert_async", ("torch",)),
    # Of PEFT
    Attribute("get_base_model", ("peft.PeftModel",)),
    Attribute("merge_and_unload", ("peft.tuners.lora.LoraModel",)),
    Attribute("lora_variant", ("peft.tuners.lora.layer.LoraLayer",)),
    # Of DeepSpeed
    Attribute("ds_id", ("deepspeed.runtime.zero.partition_parameters.Init",)),
    Attribute("param_idx_in_group", ("deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",)),
)

# What costs are computed from
_MEASURED = (
    Attribute("num_heads", ("transformers.models.clip.modeling_clip.CLIPAttention",)),
    Attribute("num_attention_heads", ("transformers.LlamaConfig", "transformers.CLIPVisionConfig")),
    Attribute("num_key_value_heads", ("transformers.LlamaConfig",)),
    Attribute("vision_tower", (_LLAVA_MODEL,)),
    Attribute("multi_modal_projector", (_LLAVA_MODEL,)),
    Attribute("embeddings", ("transformers.CLIPVisionModel",)),
    Attribute("encoder", ("transformers.CLIPVisionModel",)),
    Attribute("patch_embedding", ("transformers.models.clip.modeling_clip.CLIPVisionEmbeddings",)),
    Attribute("class_embedding", ("transformers.models.clip.modeling_clip.CLIPVisionEmbeddings",)),
)

TRAIN_SAMPLER = Override("_get_train_sampler", _TRAINER)
SAVE = Override("_save", _TRAINER)
LOAD_FROM_CHECKPOINT = Override("_load_from_checkpoint", _TRAINER)
LOAD_BEST_MODEL = Override("_load_best_model", _TRAINER)
OUTPUT_DIR = Override("_get_output_dir", _TRAINER)
SAVE_CHECKPOINT = Override("_save_checkpoint", _TRAINER)
PUSH_FROM_CHECKPOINT = Override("_push_from_checkpoint", _TRAINER)
RUN_EPOCH = Override("_run_epoch", _TRAINER)
COLLATOR = Override("_get_collator_with_removed_columns", _TRAINER)
COLUMNS = Override("_remove_unused_columns", _TRAINER)
COMPUTE_LOSS = Override("compute_loss", _TRAINER)
EVALUATION_LOOP = Override("evaluation_loop", _TRAINER)
PREDICTION_STEP = Override("prediction_step", _TRAINER)
LOG = Override("log", _TRAINER)

_OF_TRAINER = (
    TRAIN_SAMPLER,
    SAVE,
    LOAD_FROM_CHECKPOINT,
    LOAD_BEST_MODEL,
    OUTPUT_DIR,
    SAVE_CHECKPOINT,
    PUSH_FROM_CHECKPOINT,
    RUN_EPOCH,
    COLLATOR,
    COLUMNS,
    COMPUTE_LOSS,
    EVALUATION_LOOP,
    PREDICTION_STEP,
    LOG,
    # Read, or set so that Trainer reads them
    Attribute("model_accepts_loss_kwargs", _TRAINER),
    Attribute("loss_is_scaled_for_ga", _TRAINER),
    Attribute("current_gradient_accumulation_steps", _TRAINER),
    Attribute("compute_loss_func", _TRAINER),
    Attribute("_train_batch_size", _TRAINER),
    Attribute("is_in_train", _TRAINER),
    Attribute("is_fsdp_enabled", _TRAINER),
    Attribute("is_deepspeed_enabled", _TRAINER),
    Attribute("end_of_dataloader", ("accelerate.state.GradientState",)),
    Attribute("remainder", ("accelerate.state.GradientState",)),
    Attribute("train_sampling_strategy", ("transformers.TrainingArguments",)),
    Attribute("average_tokens_across_devices", ("transformers.TrainingArguments",)),
    Attribute("label_smoothing_factor", ("transformers.TrainingArguments",)),
)

HOOKED: tuple[Lookup, ...] = (*_ARGUMENTS, *_ATTRIBUTES)  # what `compress` and `EPIC` look up
ALL: tuple[Lookup, ...] = (*HOOKED, *_MEASURED, *_OF_TRAINER)


def gone(lookups: Iterable[Lookup]) -> Iterator[str]:
    """A line for each name that is gone from where it was.

    Args:
        lookups: which ones to walk.
    """
    for each in lookups:
        yield from each.gone()


def check_release() -> None:
    """Raise unless the installed releases have every name that `compress` and `EPIC` look up.

    They are walked once in a process: from then on, what a model lacks it does not have. Packages that nobody imported
    stay so.

    Raises:
        MissingDependencyError: names what is gone.
    """
    packages = {path.partition(".")[0] for each in HOOKED for path in each.on}
    _check(frozenset(name for name in packages if name in sys.modules))


@cache
def _check(packages: frozenset[str]) -> None:
    lines = list(gone(each for each in HOOKED if all(path.partition(".")[0] in packages for path in each.on)))
    if lines:
        raise MissingDependencyError(
            f"compress and EPIC need names that the installed releases no longer have; the first is: {lines[0]}.\n"
            f"Hint: Install the versions that tokencurric[hf] names, or a newer tokencurric; gone are: {lines}."
        )
