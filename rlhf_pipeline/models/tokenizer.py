"""One tokenizer for all stages: left padding, and a pad token that is nothing else."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.base import check_files, load_config, refuse_untrusted_code
from rlhf_pipeline.recipe.schema import Model


def load_tokenizer(model: Model | str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and make it fit for every stage.

    PPO finds the end of a reply by its padding, so pad must differ from EOS: with pad == EOS, TRL masks EOS out and
    takes padding for the end of a reply. Where the tokenizer has no pad token of its own, a special token that text
    never contains takes its place. The embedding is never resized: it belongs to the base.

    Args:
        model: the recipe's `model`; a folder or hub id alone stands for one with nothing else said.

    Returns:
        The tokenizer, padding on the left, with `pad_token_id` different from `eos_token_id`.

    Raises:
        InputError: the model has no tokenizer, one whose code is not trusted, no EOS, or nothing that can serve as
            padding.
    """
    spec = Model(path=model) if isinstance(model, str) else model
    path = spec.path
    check_files(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=spec.trust_remote_code, padding_side="left"
        )
    except (OSError, ValueError, KeyError) as error:
        refuse_untrusted_code(spec, error)
        raise InputError(
            f"no tokenizer could be loaded: {str(error).splitlines()[0]}",
            place=f"model.path: {path}",
            hint="a model folder needs its tokenizer files; a hub id needs the network once",
        ) from None
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so replies could never end",
            place=f"model.path: {path}",
            hint="set `eos_token` in its tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _pad_token(tokenizer, spec)
    return tokenizer


def _pad_token(tokenizer: PreTrainedTokenizerBase, spec: Model) -> str:
    """A token for padding that exists, that is neither EOS nor BOS, and that text does not contain."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if str(token) not in taken]
    for wanted in ("pad", "unk", "reserved"):
        for token in special:
            if wanted in token.lower():
                return token
    # Many models have more embedding rows than tokens; such a row serves without resizing anything.
    if load_config(spec).get_text_config().vocab_size > len(tokenizer):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        return "<|pad|>"
    raise InputError(
        "the tokenizer has no pad token, and none that could serve as one",
        place=f"model.path: {spec.path}",
        hint="add one with `tokenizer.add_special_tokens`, resize the model's embedding, and save both to a folder",
    )
