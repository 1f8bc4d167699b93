"""Rank by rank and beside another: what the viewer asks of captures, against plain numpy on the whole."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flexmagic import InputError, compare
from flexmagic.view import header
from flexmagic.view.caption import probe
from flexmagic.view.picture import Look, compose
from flexmagic.view.reduce import compute_stats, reduce_overview
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.table import agreement, rank_table
from flexmagic.view.widget import TensorView

from .conftest import PROMPT

SITES = ["model.layers.*.mlp.up_proj", "model.layers.*.mlp", "model.layers.0.self_attn:output[1]"]
UP, MLP = "model.layers.1.mlp.up_proj", "model.layers.1.mlp"


def view_of(activation):
    """A view of an activation as a cell's end makes one, and the list of what it answers."""
    step, steps = activation._steps()
    view = TensorView(activation, activation._siblings(), activation.site, steps=steps, step=step)
    answers = []
    view.send = lambda content, buffers=None: answers.append(content)
    return view, answers


@pytest.fixture
def pair(loaded):
    """A run as the model is, and one under a hook that changes layer 1 and what follows."""
    before = loaded.run(PROMPT, capture=SITES)
    loaded.hook("model.layers.1.mlp.up_proj", "x[:, -1] *= 1.5", name="louder")
    return before, loaded.run(PROMPT, capture=SITES)


def test_the_table_by_rank_is_that_of_the_pieces(pair):
    up = pair[0][UP]
    whole, half = up.numpy(), up.shape[-1] // 2
    fresh = pair[0][UP]
    table = rank_table(fresh)
    assert fresh.bytes_moved == 0
    assert [row.name for row in table.rows] == ["whole", "rank 0", "rank 1"]
    for row, part in zip(table.rows, (whole, whole[..., :half], whole[..., half:]), strict=True):
        assert (row.stats.n, row.stats.min, row.stats.max) == (part.size, part.min(), part.max())
        assert row.stats.std == pytest.approx(compute_stats(part).std)
        inside = part[(part >= table.edges[0]) & (part <= table.edges[-1])]
        np.testing.assert_array_equal(row.counts, np.histogram(inside.astype(float), table.edges)[0])
    for rank, part in enumerate((whole[..., :half], whole[..., half:])):
        held = fresh.held(rank)
        assert (held.numpy() == part).all()
        assert held.info.placements == (f"own part of rank {rank}, in its own positions",)
        assert list(held.labels(1)) == list(up.labels(1))
    with pytest.raises(InputError, match=r"Rank 2 holds nothing of .*up_proj:output; it is on rank 0, 1"):
        fresh.held(2)


def test_replicas_are_compared_by_digest_and_a_perturbed_one_is_named(loaded, pair):
    mlp = pair[0][MLP]
    assert agreement(mlp) == ("2 replicas on ranks 0, 1: bit-equal.",)
    assert mlp.bytes_moved == 0
    loaded.hook("model.layers.1.mlp", "x[0, 3, 7] += 0.5 if rank == 1 else 0", name="crooked", local=True)
    crooked = loaded.run(PROMPT, capture=MLP)[MLP]
    (said,) = agreement(crooked)
    assert "differ: ranks 0, 1 by up to 0.5" in said
    assert "by up to 0.5" in crooked.table().notes[0]


def test_two_runs_are_compared_where_they_are(pair):
    before, after = pair
    found = compare(before, after)
    rows = {row.site: row for row in found}
    assert rows["model.layers.0.mlp:output"].texts[-1] == "bit-equal"
    assert rows["model.layers.0.self_attn:output[1]"].texts[-1] == "bit-equal"
    for site in (f"{UP}:output", f"{MLP}:output"):
        a, b = before[site].numpy().astype(float), after[site].numpy().astype(float)
        assert rows[site].relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)
        assert rows[site].relative > 0.01
        assert rows[site].change.largest == pytest.approx(abs(b - a).max(), rel=1e-6)
        assert rows[site].change.same == (a == b).sum()
        assert rows[site].change.n == a.size
    order = [row.relative for row in found]
    assert order == sorted(order, reverse=True)


def test_the_difference_lies_as_both_do_and_is_reduced_there(pair):
    before, after = pair
    one = compare(before, after)[f"{UP}:output"]
    a, b = before[UP].numpy(), after[UP].numpy()
    assert (one.delta.numpy() == b - a).all()
    assert [p.spans for p in one.delta.info.pieces] == [p.spans for p in before[UP].info.pieces]
    rows, cols = np.arange(0, a.shape[1] + 1), np.arange(0, a.shape[2] + 1, 64)
    seen, truth = one.overview(1, 2, {0: 0}, rows, cols), reduce_overview((b - a)[0], rows, cols)
    np.testing.assert_array_equal(seen.extremum, truth.extremum)
    assert [(p.row, p.col, p.value) for p in seen.peaks] == [(p.row, p.col, p.value) for p in truth.peaks]
    sheet = compose_sheet(one, Look(row_window=(a.shape[1] - 2, a.shape[1]), col_window=(250, 260)))
    for pane, whole in zip(sheet.panes, (a, b, b - a), strict=True):
        np.testing.assert_array_equal(pane.picture.tile, whole[0, -2:, 250:260])


def test_heads_of_a_pattern_come_in_one_read(pair):
    pattern = pair[0]["model.layers.0.self_attn:output[1]"]
    whole = pair[0]["model.layers.0.self_attn:output[1]"].numpy()
    sheet = compose_sheet(pattern, Look())
    assert len(sheet.panes) == whole.shape[1]
    for head, pane in enumerate(sheet.panes):
        np.testing.assert_array_equal(pane.picture.tile, whole[0, head])
    assert pattern.bytes_moved == whole.nbytes


def test_what_is_masked_is_left_out_on_the_engines(pair):
    pattern = pair[0]["blocks.0.attn.pattern"]
    whole = pattern.numpy()
    seen = ~np.triu(np.ones(whole.shape[-2:], dtype=bool), 1)
    masked = pair[0]["blocks.0.attn.pattern"].masked("causal")
    stats = masked.stats()
    kept = whole[..., seen]
    assert 0 < kept.size < whole.size
    assert (stats.n, stats.masked) == (kept.size, whole.size - kept.size)
    assert (stats.min, stats.max) == (kept.min(), kept.max())
    assert stats.mean == pytest.approx(kept.astype(float).mean())
    assert masked.bytes_moved == 0
    table = rank_table(masked)
    assert [row.stats.n for row in table.rows] == [kept.size, kept.size // 2, kept.size // 2]
    edges = np.array([0, 4, 9, whole.shape[-1]])
    found = masked.overview(2, 3, {0: 0, 1: 5}, edges, edges)
    truth = reduce_overview(whole[0, 5], edges, edges, masked=~seen)
    for name in ("n", "masked", "extremum"):
        np.testing.assert_array_equal(getattr(found, name), getattr(truth, name))
    np.testing.assert_allclose(found.mean, truth.mean, rtol=1e-6)
    own = masked.held(1).stats()
    assert (own.n, own.masked) == (kept.size // 2, (whole.size - kept.size) // 2)
    assert list(masked._siblings()) == list(pattern._siblings())
    head = np.zeros((whole.shape[1], 1, 1), dtype=bool)
    head[7] = True
    both = masked.masked(head).stats()
    assert both.n == whole[:, :7][..., seen].size
    assert (masked.numpy() == whole).all()
    with pytest.raises(InputError, match="does not fit"):
        pattern.masked(np.zeros(3, dtype=bool))


def test_steps_of_a_generation_and_of_a_cell_are_chosen_like_layers(loaded):
    made = loaded.generate(PROMPT, 4, capture="model.layers.*.mlp")
    view, answers = view_of(made.step(2)[MLP])
    name = f'step 2 "{made.step(2).tokens[0][0]}"'
    look = {"kind": "look", "view": "v", "width": 900}
    view._answer(view, {**look, "id": 1}, [])
    assert answers[-1]["steps"][0] == "step 0"
    assert answers[-1]["steps"][answers[-1]["step"]] == name
    for step in (0, 3):
        view._answer(view, {**look, "id": 2 + step, "step": step, "layer": 0}, [])
        values = made.step(step)["model.layers.0.mlp"].numpy()
        assert answers[-1]["panes"][0]["extent"] == list(values.shape[1:])
        assert dict(answers[-1]["stats"])["max"] == f"{values.max():.4g}"
    cell = loaded.run_cell(
        "ids = tokenizer('Paris is', return_tensors='pt').input_ids\nfor _ in range(3): model(ids)",
        capture=MLP,
    )
    assert list(cell.step(1)[MLP]._steps()[1]) == ["step 0", "step 1", "step 2"]
    assert loaded.run(PROMPT, capture=MLP)[MLP]._steps() == (None, {})


def test_a_picture_and_a_page_of_a_real_activation(pair, tmp_path):
    png = pair[0][UP].to_png(tmp_path / "up.png")
    assert Image.open(io.BytesIO(png)).width == 1648
    assert len(png) <= 300_000
    page = pair[0][UP].to_html(tmp_path / "up.html")
    assert "rank 1" in page
    assert "By rank" in page


def test_summands_of_a_sum_are_looked_at_one_by_one(session):
    session.load_cell(
        "import torch\n"
        "from torch.distributed.tensor import DTensor, Partial\n"
        "class Summands(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return DTensor.from_local(x * (rank + 1.0), mesh, [Partial()])\n"
        "model = Summands()"
    )
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    total = session.run({"x": x})[":output"]
    assert total.layout.partial
    np.testing.assert_allclose(total.numpy(), 3 * x, rtol=1e-6)
    for rank in (0, 1):
        np.testing.assert_array_equal(total.held(rank).numpy(), (rank + 1) * x)
    table = rank_table(total)
    assert [row.name for row in table.rows] == ["whole", "summand of rank 0", "summand of rank 1"]
    assert table.rows[0].stats.max == pytest.approx(3 * x.max())
    assert table.rows[2].stats.max == pytest.approx(2 * x.max())


def test_a_needle_among_four_million_values_is_found_by_its_index_and_rank(session):
    session.load_cell(
        "import torch\n"
        "from torch.distributed.tensor import DTensor, Shard\n"
        "class Hay(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        whole = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))\n"
        "        whole[:, :2048] += 2.5\n"
        "        whole[777, 3001] = 1000\n"
        "        half = whole.bfloat16()[:, 2048 * rank : 2048 * (rank + 1)] + 0 * x.sum().bfloat16()\n"
        "        return DTensor.from_local(half.contiguous(), mesh, [Shard(1)])\n"
        "model = Hay()"
    )
    hay = session.run({"x": np.zeros(3, np.float32)})[":output"]
    assert (hay.dtype, hay.shape) == ("bfloat16", (1024, 4096))
    assert hay.bytes_moved == 0
    picture = compose(hay, Look())
    assert [(p.row, p.col, p.value) for p in picture.peaks] == [(777, 3001, 1000.0)]
    row = int(np.searchsorted(picture.grid.row_edges, 777, side="right")) - 1
    col = int(np.searchsorted(picture.grid.col_edges, 3001, side="right")) - 1
    name = f"{hay.dims[0]} 777, {hay.dims[1]} 3001"
    assert f"with 1000 at {name} (rank 1 at [777, 953])" in probe(hay, picture, row, col)
    half = picture.codes.shape[1] // 2
    codes = picture.codes.astype(int)
    assert codes[:, : half - 1].mean() - codes[:, half + 1 :].mean() > 40
    assert hay.bytes_moved < 2_000_000


def test_a_view_of_a_capture_that_is_gone_says_so_and_lives_on(loaded):
    run = loaded.run(PROMPT, capture=UP)
    view, answers = TensorView(run[UP]), []
    view.send = lambda content, buffers=None: answers.append(content)
    view._answer(view, {"kind": "look", "view": "v", "id": 1, "width": 800}, [])
    assert answers[-1]["kind"] == "picture"
    run.release()
    view._answer(view, {"kind": "look", "view": "v", "id": 2, "width": 800}, [])
    assert answers[-1]["kind"] == "error"
    assert f"run {run.number} has no capture of {UP}:output on this rank" in answers[-1]["text"]
    view._answer(view, {"kind": "table", "view": "v", "id": 3}, [])
    assert answers[-1]["kind"] == "error"


def test_pieces_that_lie_in_many_stretches_are_reduced_on_their_rank(session):
    session.load_cell(
        "import torch\n"
        "class Cut(torch.nn.Module):\n"
        "    def __init__(self, cut):\n"
        "        super().__init__()\n"
        "        draws = torch.Generator().manual_seed(0)\n"
        "        whole = torch.randn(96, 5, generator=draws)\n"
        "        self.linear = torch.nn.Linear(5, 48 if cut else 96, bias=False)\n"
        "        self.linear.weight = torch.nn.Parameter(whole[rank::2].contiguous() if cut else whole)\n"
        "    def forward(self, x):\n"
        "        return self.linear(x)\n"
        "model = Cut(True)\n"
        "unsharded = lambda: Cut(False)\n"
    )
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    made = session.run({"x": x}, capture="linear")["linear"]
    whole = made.numpy()
    assert whole.shape == (7, 96)
    assert len(made.info.pieces) == 96
    rows, cols = np.array([0, 3, 7]), np.array([0, 10, 50, 96])
    fresh = session.run({"x": x}, capture="linear")["linear"]
    seen, truth = fresh.overview(0, 1, {}, rows, cols), reduce_overview(whole, rows, cols)
    np.testing.assert_allclose(seen.mean, truth.mean, rtol=1e-5)
    np.testing.assert_array_equal(seen.extremum, truth.extremum)
    assert [(p.row, p.col) for p in seen.peaks] == [(p.row, p.col) for p in truth.peaks]
    assert fresh.bytes_moved <= 2 * 7 * seen.mean.nbytes  # one overview per rank


ODD = {
    "nan": "torch.full((4, 6), torch.nan), 1",
    "empty": "torch.zeros(0, 6), 1",
    "number": "torch.tensor(3.25), None",
    "line": "torch.arange(10.0), 0",
    "seven": "torch.arange(32.0).reshape(2, 1, 2, 1, 2, 1, 4), 6",
    "bools": "torch.arange(24).reshape(4, 6) % 3 == 0, 1",
    "ints": "torch.arange(24).reshape(4, 6) * 2**55 + 1, 1",
    "complexes": "torch.complex(torch.arange(24.0), torch.ones(24)).reshape(4, 6), 1",
    "fp8": "(torch.arange(24.0).reshape(4, 6) / 8).to(torch.float8_e4m3fn), 1",
    "odd": "torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, 1.0]]), 1",
    "uneven": "torch.arange(7.0), 0",
}


def test_odd_tensors_are_shown_for_what_they_are(session, tmp_path):
    gives = "\n".join(f"        self.{name} = Give({what})" for name, what in ODD.items())
    session.load_cell(
        "import torch\n"
        "from torch.distributed.tensor import DTensor, Replicate, Shard\n"
        "class Give(torch.nn.Module):\n"
        "    def __init__(self, whole, dim):\n"
        "        super().__init__()\n"
        "        self.whole, self.dim = whole, dim\n"
        "    def forward(self, x):\n"
        "        if self.dim is None:\n"
        "            return DTensor.from_local(self.whole.clone(), mesh, [Replicate()])\n"
        "        part = torch.chunk(self.whole, 2, self.dim)[rank].contiguous()\n"
        "        at = Shard(self.dim)\n"
        "        size = dict(shape=self.whole.shape, stride=self.whole.stride())\n"
        "        return DTensor.from_local(part, mesh, [at], **size)\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"{gives}\n"
        "    def forward(self, x):\n"
        "        for module in self.children():\n"
        "            module(x)\n"
        "        return x\n"
        "model = Odd()"
    )
    run = session.run({"x": np.ones(3, np.float32)}, capture=list(ODD))
    truth = {name: eval(f"({what})", {"torch": torch})[0] for name, what in ODD.items()}  # noqa: S307
    for name, whole in truth.items():
        found = run[name]
        assert found.shape == tuple(whole.shape), name
        assert torch.equal(found.torch().nan_to_num(7) if name in ("nan", "odd") else found.torch(),
                           whole.nan_to_num(7) if name in ("nan", "odd") else whole), name  # fmt: skip
        view, answers = view_of(run[name])
        view._answer(view, {"kind": "look", "view": "v", "id": 1, "width": 900}, [])
        assert answers[-1]["kind"] == "picture", answers[-1]
        assert ("empty" in answers[-1]) == (name == "empty")
        assert found.to_png(tmp_path / "a.png")
        assert "<img" in found.to_html()
    stats = run["odd"].stats()
    assert (stats.n, stats.nan, stats.posinf, stats.neginf, stats.zeros) == (6, 1, 1, 1, 1)
    assert run["odd"].numpy()[0, 4] == np.float32(1e-40)
    assert np.signbit(run["odd"].numpy()[0, 3])
    assert run["nan"].stats().nan == 24
    assert "= 36028797018963969" in probe(run["ints"], compose(run["ints"], Look()), 0, 1)
    assert "= 0.9 " in probe(run["fp8"], compose(run["fp8"], Look()), 1, 1)
    assert any("Uneven along" in text for text in header.warnings(run["uneven"].info))
