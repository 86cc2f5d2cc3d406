"""Fewer layers of a model, with every kind of layer that it has, and the pattern in which they come."""

from typing import Any

from transformers import PretrainedConfig

_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")  # lists of layers by their numbers
# After how many layers a pattern starts again.
_PERIODS = (
    "_sliding_window_pattern", "sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval",
    "decoder_sparse_step", "attn_layer_period", "expert_layer_period", "moe_layer_interval",
    "interleave_moe_layer_step", "global_attn_every_n_layers",
)  # fmt: skip


def of_every_kind(config: PretrainedConfig) -> int:
    """How many layers, at least two, it takes to have every kind of layer."""
    keys, layers = config.to_dict(), config.num_hidden_layers
    by_layer, numbers = _lists(config)
    kept = 2
    for value in by_layer.values():
        kinds = [repr(kind) for kind in value]
        kept = max(kept, *(kinds.index(kind) + 1 for kind in kinds))
    if (blocks := by_layer.get("layers_block_type", [])).count("hybrid") > 1:  # of Zamba: they share their attention
        kept = max(kept, blocks.index("hybrid", blocks.index("hybrid") + 1) + 1)
    kept = max(kept, len(keys.get("block_types") or ()), *(min(value, default=0) + 1 for value in numbers.values()))
    kept = min(layers, max(kept, *(keys.get(name) or 1 for name in _PERIODS)))
    if keys.get("attention_types"):  # of GPT-Neo: [[kinds, how often], …]
        return sum(len(kinds) for kinds, _ in config.attention_types)
    if shared := keys.get("num_kv_shared_layers"):  # the last ones, which take keys and values of earlier ones
        kinds = keys.get("layer_types") or []
        while kept < layers and set(kinds[: kept - shared * kept // layers]) != set(kinds):
            kept += 1
    return kept


def keep(config: PretrainedConfig, kept: int) -> None:
    """Leave a configuration its first layers, this many."""
    keys, layers = config.to_dict(), config.num_hidden_layers
    by_layer, numbers = _lists(config)
    if keys.get("attention_types"):  # of GPT-Neo: [[kinds, how often], …]
        config.attention_types = [[kinds, 1] for kinds, _ in config.attention_types]
        config.attention_layers = config.expand_attention_types_params(config.attention_types)
        by_layer = {}
    if shared := keys.get("num_kv_shared_layers"):
        config.num_kv_shared_layers = shared * kept // layers
    config.num_hidden_layers = kept
    for name in ("encoder_layers", "decoder_layers"):
        if keys.get(name):
            setattr(config, name, min(keys[name], kept))
    for name in by_layer:
        setattr(config, name, getattr(config, name)[:kept])
    if keys.get("max_window_layers"):
        config.max_window_layers = min(keys["max_window_layers"], kept)
    for name, value in numbers.items():
        setattr(config, name, [layer for layer in value if layer < kept])


def _lists(config: PretrainedConfig) -> tuple[dict[str, list[Any]], dict[str, list[int]]]:
    """What a configuration says of each layer, one entry a layer; and its lists of layers by their numbers."""
    keys, layers = config.to_dict(), config.num_hidden_layers
    by_layer = {name: value for name, value in keys.items() if isinstance(value, list) and len(value) == layers}
    return by_layer, {name: by_layer.pop(name, keys[name]) for name in _LAYER_NUMBERS if keys.get(name)}


def period(config: PretrainedConfig) -> int:
    """After how many layers, at most, their pattern starts again: 1 where all are alike."""
    by_layer, numbers = _lists(config)
    keys = config.to_dict()
    alike = all(len({repr(kind) for kind in value}) == 1 for value in by_layer.values())
    patterns = numbers or keys.get("attention_types") or any((keys.get(name) or 1) != 1 for name in _PERIODS)
    return 1 if alike and not patterns else of_every_kind(config)
