"""A causal LM as a reward model: the same backbone under the same name, and a head that reads one number.

Nothing of this package is imported here: an exported reward model brings this file along where Transformers has no
class that loads it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

HEAD = "score"  # its name in the model; of Transformers' sequence classifiers over causal LMs most have it too


class ScoreHead(nn.Module):
    """What comes first among the bases of a reward model's class, and the class of the causal LM second."""

    config: Any
    all_tied_weights_keys: Any
    _tied_weights_keys = None  # there is no output embedding to tie
    _auto_class = None  # of a base whose code comes with it, the class would be saved as that

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.put_head()

    def put_head(self) -> None:
        """Have a head, drawn at random, and nothing else beside the backbone."""
        causal: Any = super()
        backbone, width = backbone_name(self), _width(causal.get_output_embeddings(), self.config)
        for name, _ in [*self.named_children()]:
            if name != backbone:
                delattr(self, name)
        tied = self.all_tied_weights_keys
        self.all_tied_weights_keys = {name: to for name, to in tied.items() if name.startswith(f"{backbone}.")}
        self.config.num_labels = 1
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """One score for each text, read at its last token.

        Args:
            input_ids: int64 `[batch, length]`, padded on either side.
            attention_mask: 0 on padding, of the same shape; without it, padding is where the padding token is.
            inputs: more for the backbone.

        Returns:
            `logits`: `[batch, 1]`, in the head's dtype, whatever that of the backbone is.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None} | {"use_cache": False}
        backbone = getattr(self, backbone_name(self))
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if attention_mask is None:
            pad = self.config.get_text_config().pad_token_id
            attention_mask = torch.ones_like(input_ids) if pad is None else input_ids != pad
        places = torch.arange(input_ids.shape[1], device=hidden.device)
        last = (places * attention_mask.to(hidden.device)).argmax(1)
        read = hidden[torch.arange(len(hidden), device=hidden.device), last]
        with torch.autocast(hidden.device.type, enabled=False):
            return SequenceClassifierOutput(logits=self.score(read.to(self.score.weight.dtype)))

    def get_output_embeddings(self) -> None:
        """None: the head makes no logits of tokens."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the causal LM: Transformers renames the weights of a checkpoint for its own classes alone."""
        causal: Any = cls.__mro__[cls.__mro__.index(ScoreHead) + 1]
        return bool(causal.is_custom_code())

    @classmethod
    def can_generate(cls) -> bool:
        """False."""
        return False


def with_score_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make a causal LM a reward model: the same object, whose weights stay where they are, of another class.

    Its head is in float32, on the model's device.
    """
    causal = type(model)
    model.__class__ = type(f"{causal.__name__}WithScoreHead", (ScoreHead, causal), {"__module__": __name__})
    with torch.device(model.device):
        model.put_head()
    return model


def draw(head: nn.Linear) -> None:
    """Draw a head from N(0, 1/(d+1)), d the hidden size, so that first numbers have about unit variance.

    After Stiennon et al. 2020, "Learning to summarize from human feedback", and Huang et al. 2024, "The N+
    Implementation Details of RLHF with PPO".
    """
    drawn = torch.empty(head.weight.shape)  # on the CPU, so that they are the same numbers wherever the head is
    nn.init.normal_(drawn, std=(head.weight.shape[-1] + 1) ** -0.5)
    head.weight.data.copy_(drawn)


def new_head(model: PreTrainedModel) -> nn.Linear:
    """A head of its own for a causal LM's backbone, in float32 on the CPU; see `draw`."""
    head = nn.Linear(_width(model.get_output_embeddings(), model.config), 1, bias=False)
    draw(head)
    return head


def zero_head(model: PreTrainedModel) -> nn.Linear:
    """The same, but it says 0 of everything until it has learned: for values that are read from the policy's states.

    What nobody taught yet is then no noise in the advantages, whatever the width, and its loss has no gradient for what
    is below the head until the head has learned something. OpenAI's first RLHF began so, too (Huang et al. 2023, "The N
    Implementation Details of RLHF with PPO").
    """
    head = nn.Linear(_width(model.get_output_embeddings(), model.config), 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def backbone_name(model: Any) -> str:
    """The name of a causal LM's child that makes the last hidden states.

    Raises:
        ValueError: it has no such child.
    """
    prefix = model.base_model_prefix
    if isinstance(getattr(model, prefix, None), nn.Module):
        return str(prefix)
    embedding = model.get_input_embeddings()  # some classes have the prefix of a model that they are a part of
    for name, child in model.named_children():
        if child is not embedding and any(module is embedding for module in child.modules()):
            return name
    raise ValueError(f"{type(model).__name__} has no backbone that can be found")


def _width(output_embedding: nn.Module | None, config: Any) -> int:
    """The width of the last hidden states, which an output embedding knows best: OPT's may be narrower inside."""
    width = getattr(output_embedding, "in_features", None)
    return int(width or config.get_text_config().hidden_size)
