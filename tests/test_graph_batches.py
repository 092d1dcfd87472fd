"""Batches of graphs, which are objects of another library, go whole through the steps that a user writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fitkit


class Graph:
    """A graph or several in the manner of torch_geometric: nodes, edges, and to which graph a node belongs."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor, batch: Tensor, num_graphs: int = 1) -> None:
        self.x, self.edge_index, self.y, self.batch, self.num_graphs = x, edge_index, y, batch, num_graphs
        self.moved_to: list[Any] = []

    def to(self, device: torch.device) -> Graph:
        moved = Graph(*(part.to(device) for part in (self.x, self.edge_index, self.y, self.batch)), self.num_graphs)
        moved.moved_to = [*self.moved_to, device]
        return moved


def ring(nodes: int) -> Graph:
    """A ring of nodes; whether their number is odd is to be learnt."""
    edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
    x = torch.linspace(-1, 1, 3 * nodes).reshape(nodes, 3)
    return Graph(x, edges, torch.tensor([nodes % 2]), torch.zeros(nodes, dtype=torch.long))


def collate(graphs: Sequence[Graph]) -> Graph:
    starts = torch.tensor([0, *(len(graph.x) for graph in graphs)]).cumsum(0).tolist()
    return Graph(
        torch.cat([graph.x for graph in graphs]),
        torch.cat([graph.edge_index + start for graph, start in zip(graphs, starts, strict=False)], dim=1),
        torch.cat([graph.y for graph in graphs]),
        torch.cat([graph.batch + number for number, graph in enumerate(graphs)]),
        len(graphs),
    )


class GraphNet(nn.Module):
    """Sums over neighbours, then a mean over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, graphs: Any) -> Tensor:
        source, target = graphs.edge_index
        hidden = self.nodes(graphs.x)
        hidden = hidden.index_add(0, target, hidden[source]).relu()
        sums = hidden.new_zeros(graphs.num_graphs, 8).index_add(0, graphs.batch, hidden)
        output: Tensor = self.head(sums / torch.bincount(graphs.batch, minlength=graphs.num_graphs).unsqueeze(1))
        return output


class GraphModel(fitkit.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.module(batch)
        return {"loss": F.cross_entropy(output, batch.y), "output": output, "target": batch.y}

    validation_step = training_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        output: Tensor = self.module(batch)
        return output


def own_loaders() -> Callable[[int], Any]:
    graphs = [ring(nodes) for nodes in range(3, 21)]
    return lambda size: DataLoader(graphs, batch_size=size, collate_fn=collate)


def torch_geometric_loaders() -> Callable[[int], Any]:
    with warnings.catch_warnings():
        # It scripts its classes when it is imported, and torch says of each that this is deprecated.
        warnings.simplefilter("ignore")
        pytest.importorskip("torch_geometric")
        from torch_geometric.data import Data
        from torch_geometric.loader import DataLoader as GraphLoader
    graphs = [Data(x=graph.x, edge_index=graph.edge_index, y=graph.y) for graph in map(ring, range(3, 21))]
    return lambda size: GraphLoader(graphs, batch_size=size)


@pytest.fixture(params=[own_loaders, torch_geometric_loaders])
def loader(request: pytest.FixtureRequest) -> Callable[[int], Any]:
    loaders: Callable[[int], Any] = request.param()
    return loaders


def compiled(**options: Any) -> GraphModel:
    model = GraphModel(GraphNet(), device="cpu")
    model.compile(**({"optimizer": "sgd", "learning_rate": 0.1, "metrics": ["accuracy"]} | options))
    return model


def test_batches_of_graphs_train_validate_and_predict(loader: Any) -> None:
    model = compiled()
    history = model.fit(loader(4), epochs=3, validation_data=loader(8), verbose=0)
    assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert history["loss"][-1] < history["loss"][0]
    assert model.predict(loader(4), verbose=0).shape == (18, 2)
    assert model.evaluate(loader(5), verbose=0) == pytest.approx(model.evaluate(loader(18), verbose=0), rel=1e-6)


def test_accumulated_batches_of_graphs_are_the_large_batch(loader: Any) -> None:
    whole, windows = compiled(), compiled()
    whole.fit(loader(18), epochs=3, verbose=0)
    windows.fit(loader(4), epochs=3, accumulate_grad_batches=5, verbose=0)  # 4 + 4 + 4 + 4 + 2 graphs
    torch.testing.assert_close(windows.module.state_dict(), whole.module.state_dict(), rtol=1e-5, atol=1e-7)


def test_a_learning_rate_is_found_for_graphs(loader: Any) -> None:
    found = compiled(optimizer="adam").find_learning_rate(loader(4), steps=20, end=1e-3, verbose=0)
    assert len(found.losses) == 20


def test_a_batch_object_moves_itself_to_the_device() -> None:
    seen: list[list[Any]] = []

    class Noting(GraphModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch.moved_to)
            return super().training_step(batch, batch_idx)

    model = Noting(GraphNet(), device="cpu")
    model.compile("sgd", precision="64-true")  # float64 asks for a move on the CPU too
    batch = collate([ring(3), ring(4)])
    batch.x = batch.x.double()
    model.fit([batch], epochs=1, verbose=0)
    assert seen == [[torch.device("cpu")]]
