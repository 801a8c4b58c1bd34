"""What compression is held against: the model at full length, with dropped tokens hidden as keys."""

from contextlib import contextmanager

import torch


@contextmanager
def masking(model, dropped, layer):
    """Layers from `layer` on run on all tokens, under the model's own masks with dropped tokens hidden besides."""
    decoder = model.get_decoder()
    while not hasattr(decoder, "layers"):
        decoder = decoder.model
    own = torch.eye(dropped.shape[1], dtype=torch.bool)
    gone = dropped[:, None, None, :] & ~own

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        if mask is None:
            mask = torch.ones_like(own).tril()[None, None]
        hidden = mask & ~gone if mask.dtype == torch.bool else mask.masked_fill(gone, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": hidden}

    handles = [each.register_forward_pre_hook(hide, with_kwargs=True) for each in decoder.layers[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lengthened(inputs, sequences, *, new_type):
    """The inputs of a prompt, for the prompt and what was generated after it."""
    length, total = inputs["input_ids"].shape[1], sequences.shape[1]
    longer = dict(inputs, input_ids=sequences)
    for name, value in (("attention_mask", 1), ("token_type_ids", new_type), ("mm_token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, total - length), value=value)
    return longer


def recomputed(model, inputs, dropped, layer, sequences, *, new_type=0):
    """The next-token logits before each new token, from whole forwards over everything before it, without a cache."""
    prompt, logits = inputs["input_ids"].shape[1], []
    for length in range(prompt, sequences.shape[1]):
        longer = lengthened(inputs, sequences[:, :length], new_type=new_type)
        gone = torch.nn.functional.pad(dropped, (0, length - prompt))
        with masking(model, gone, layer):
            logits.append(model(**longer, use_cache=False).logits[:, -1])
    return torch.stack(logits)


def error(ours, theirs):
    """Largest difference, relative to the largest of what is compared with."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
