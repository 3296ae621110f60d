"""Sparse layers on two processes: the losses of one, and weights that shard and gather."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gossamer import Block, Unstructured, distributed
from gossamer.nn import GroupedLinear, SparseConv2d, SparseLinear, SparseTrainingLinear
from gossamer.sparsify import SET, Magnitude, OneShot, RigL, Sparsifier
from torch import Tensor, nn
from two_ranks import on_two_ranks

STEPS = 3
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = SparseConv2d(8, 8, 3, pattern=Block(4, 4), density=0.5)
        self.pairs = SparseConv2d(8, 8, 1)
        self.up = SparseLinear(8, 48)
        self.blocks = SparseLinear(48, 24, pattern=Block(8, 3), density=0.4)
        self.hard = SparseTrainingLinear(24, 24, refresh=2)
        self.soft = SparseTrainingLinear(24, 16, projection="soft")
        self.experts = GroupedLinear(2, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pairs(self.conv(x)).flatten(1)
        x = self.blocks(torch.relu(self.up(x)))
        x = self.soft(torch.relu(self.hard(x)))
        return self.experts(x, torch.tensor([len(x) // 2, len(x)]))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = SparseLinear(24, 32), SparseLinear(32, 8)
        self.up.activation, self.down.activation = "relu", "gelu"

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-2)


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int | None = None
) -> list[float]:
    """Of each step; of a rank that sees every other image its part, averaged over the ranks."""
    found = []
    part = slice(None) if rank is None else slice(rank, None, 2)
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 8, 3, 3, generator=g), torch.randn(8, 4, generator=g)
        x, y = x[part].double(), y[part].double()  # no mask turns over by rounding
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if rank is not None:
            dist.all_reduce(mean)
            mean /= 2
        found.append(mean.item())
    return found


def data_parallel(rank: int, path: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    replicated = nn.parallel.DistributedDataParallel(Net().double())
    mesh = init_device_mesh("cpu", (2,))

    def sharded() -> nn.Module:
        model = Net().double()
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = sharded()
    optimizer = adam(model)
    found = {
        "ddp": losses(replicated, adam(replicated), range(STEPS), rank),
        "fsdp": losses(model, optimizer, range(STEPS), rank),
        "dense": model.blocks.weight.to_dense().detach(),
        "sharded": all(hasattr(p, "full_tensor") for p in model.parameters()),
    }
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save({"model": states["model"]}, checkpoint_id=path / "fsdp")
    again = sharded()
    loaded = {"model": again.state_dict()}
    dcp.load(loaded, checkpoint_id=path / "fsdp")
    again.load_state_dict(loaded["model"])
    its = adam(again)
    its.load_state_dict(copy.deepcopy(states["optimizer"]))
    dense = fully_shard(nn.Sequential(nn.Linear(8, 8)), mesh=mesh)
    with pytest.raises(ValueError, match="0: weight is a DTensor"):
        Sparsifier(dense, "2:4", Magnitude(), OneShot(0.5))
    found["on"] = losses(model, optimizer, range(STEPS, 2 * STEPS), rank)
    found["resumed"] = losses(again, its, range(STEPS, 2 * STEPS), rank)
    return found


def unstructured(rank: int | None = None) -> dict[str, Any]:
    """What stored recipes have made of a model, in one process or on one of two ranks."""
    found: dict[str, Any] = {}
    for name, recipe in (("SET", SET), ("RigL", RigL)):
        torch.manual_seed(rank or 0)  # the ranks begin with other weights and places
        pattern = Unstructured(0.3)
        inner = nn.Sequential(
            SparseLinear(24, 32, pattern=pattern), nn.ReLU(), SparseLinear(32, 8, pattern=pattern)
        ).double()
        if rank is not None:  # what is known of the places of before has to go
            first = torch.randn(2, 24, generator=torch.Generator().manual_seed(9)).double()
            inner(first.requires_grad_()).sum().backward()
            inner.zero_grad()
        model: nn.Module = inner if rank is None else distributed.data_parallel(inner)
        again = torch.randn(2, 24, generator=torch.Generator().manual_seed(9)).double()
        inner(again.requires_grad_()).sum().backward()
        inner.zero_grad()
        found[f"{name}, dx"] = {"first": again.grad}
        optimizer = adam(model)
        made = recipe.stored(model, optimizer, end=100, every=2)
        for step in range(5):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).double()
            part = x if rank is None else x[rank::2]
            model(part).square().mean().backward()
            optimizer.step()
            made.step()
            optimizer.zero_grad()
        found[name] = inner.state_dict()
    if rank is not None:
        with pytest.raises(ValueError, match="0 is packed"):
            distributed.data_parallel(nn.Sequential(SparseLinear(8, 8).pack()))
    return found


def tensor_parallel(rank: int, path: Path) -> dict[str, Any]:
    from gossamer.distributed import Colwise, Rowwise
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = MLP().double()
    parallelize_module(model, mesh, {"up": Colwise(), "down": Rowwise()})
    found: dict[str, Any] = {"shapes": [tuple(p.to_local().shape) for p in model.parameters()]}
    optimizer = adam(model)
    found["losses"] = mlp_losses(model, optimizer)
    dcp.save({"model": model.state_dict()}, checkpoint_id=path / "tp")
    again = MLP().double()
    parallelize_module(again, mesh, {"up": Colwise(), "down": Rowwise()})
    loaded = {"model": again.state_dict()}
    dcp.load(loaded, checkpoint_id=path / "tp")
    again.load_state_dict(loaded["model"])
    found["same"] = mlp_losses(model, adam(model)) == mlp_losses(again, adam(again))
    state = again.state_dict().items()
    found["whole"] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state}
    for wrong, style, message in (
        (SparseLinear(24, 20), Rowwise(), "24 inputs on 2 ranks, expected a multiple of 16"),
        (SparseLinear(24, 21), Colwise(), "21 outputs on 2 ranks"),
        (SparseLinear(24, 20).pack(), Colwise(), "not packed"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize_module(wrong, mesh, style)
    with pytest.raises(TypeError, match="Linear, expected a gossamer"):
        parallelize_module(nn.Linear(4, 4), mesh, Colwise())
    return found


def mlp_losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 24, generator=g).double(), torch.randn(6, 8, generator=g).double()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def found_on(rank: int, path: Path) -> dict[str, Any]:
    found = {"data": data_parallel(rank, path), "tensor": tensor_parallel(rank, path)}
    return {**found, "unstructured": unstructured(rank)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    ranks = on_two_ranks(found_on, tmp_path)
    model = Net().double()
    whole = losses(model, adam(model), range(2 * STEPS))
    for found in (rank["data"] for rank in ranks):
        assert found["ddp"] == pytest.approx(whole[:STEPS], rel=1e-9)
        assert found["fsdp"] == pytest.approx(whole[:STEPS], rel=1e-9)
        assert found["on"] == pytest.approx(whole[STEPS:], rel=1e-9)
        assert found["resumed"] == found["on"]
        assert found["sharded"]
        assert torch.equal(found["dense"], ranks[0]["data"]["dense"])
    for recipe, state in unstructured().items():
        first, second = (rank["unstructured"][recipe] for rank in ranks)
        for key, value in state.items():
            assert torch.equal(first[key], second[key]), (recipe, key)
            torch.testing.assert_close(first[key], value)
    mlp = MLP().double()
    expected = mlp_losses(mlp, adam(mlp))
    trained = copy.deepcopy(mlp)
    mlp_losses(mlp, adam(mlp))
    for found in (rank["tensor"] for rank in ranks):
        assert found["losses"] == pytest.approx(expected, rel=1e-9)
        assert found["same"]
        assert found["shapes"][:2] == [(16, 12), (16,)]
        for key, value in mlp.state_dict().items():
            torch.testing.assert_close(found["whole"][key], value)
    # What two ranks have saved one reads.
    for name, fresh, there in (("fsdp", Net().double(), None), ("tp", MLP().double(), trained)):
        state = {"model": fresh.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / name)
        fresh.load_state_dict(state["model"])
        if there is not None:
            x = torch.randn(3, 24).double()
            torch.testing.assert_close(fresh(x), there(x))
