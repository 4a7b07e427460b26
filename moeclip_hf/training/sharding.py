"""What FSDP needs: a model that can be sharded, and tensors that are put together again."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moeclip_hf.modeling.modeling_moeclip import MoECLIPModel


def make_shardable(model: "MoECLIPModel") -> None:
    """
    Have FSDP take a model.

    It shards no parameter without dimensions, so that CLIP's temperature, which MoECLIP keeps and does not use,
    becomes a buffer of the same name; and Accelerate asks for input embeddings, of which a model of two towers has
    more than one kind.
    """
    temperature = model.logit_scale.detach()
    del model.logit_scale
    model.register_buffer("logit_scale", temperature)
    model.get_input_embeddings = lambda: None  # type: ignore[method-assign]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor, gathered from all processes, every one of which must call it; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
