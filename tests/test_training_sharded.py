"""What FSDP asks of a model, in a process group of one, since accelerate offers FSDP on accelerators alone."""

from copy import deepcopy

import pytest
import torch
from tiny_models import random_anchors, random_pixels, tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeclip_hf.training.sharding import make_shardable, whole


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_model_has_the_loss_and_the_gradients_of_a_whole_one(mesh):
    plain = tiny_model().freeze_backbone()
    sharded = deepcopy(plain)
    with pytest.raises(ValueError, match="scalar parameters"):  # else there would be nothing to make of it
        fully_shard(deepcopy(plain), mesh=mesh)

    make_shardable(sharded)
    assert sharded.get_input_embeddings() is None
    for block in (*sharded.vision_model.encoder.layers, *sharded.text_model.encoder.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)

    assert sharded.state_dict().keys() == plain.state_dict().keys()
    inputs = {"text_embeds": random_anchors(), "labels": torch.tensor([0, 1]), "masks": random_pixels()[:, 0] > 1}
    losses = []
    for model in (plain, sharded):
        loss = model(random_pixels(), **inputs).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    gradients = {name: weight.grad for name, weight in sharded.named_parameters() if weight.grad is not None}
    assert gradients and gradients.keys() == {n for n, weight in plain.named_parameters() if weight.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(whole(gradient), plain.get_parameter(name).grad)
