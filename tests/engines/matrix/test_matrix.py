"""The matrix: every site of every cell equals one process or is refused as frozen, and so do edits."""

import importlib.util

import pytest
import torch

from flexmagic import CellError, LayoutError, Session

from .cells import CELLS, MODELS, STRATEGIES
from .measure import EDITS, OneProcess, compare_edits, measure, relative
from .table import END, README, START, readme_with, refused, results, table

REGENERATE = "run in tests: python -m engines.matrix.freeze"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny checkpoints are, made when first asked for."""
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def four():
    with Session.start(4, oversubscribe=True) as session:
        yield session


UNEVEN_VOCABULARY = "must be divisible by the tensor parallel size"


def marked(cell):
    marks = [] if cell.core else [pytest.mark.full]
    if cell.strategy.missing:
        marks.append(pytest.mark.skip(reason=cell.strategy.missing))
    return pytest.param(cell, id=cell.name, marks=marks)


@pytest.mark.engines
@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_sites_and_edits_equal_one_process_or_are_refused_as_frozen(request, folder, cell):
    session = request.getfixturevalue({2: "session", 4: "four"}[cell.strategy.ranks])
    one = OneProcess(cell, folder)
    try:
        cell.load(session, folder)
    except CellError as error:
        if UNEVEN_VOCABULARY in str(error):
            pytest.skip("this version of transformers splits no vocabulary that its ranks do not divide")
        raise
    found = measure(session, one)
    frozen = results()[cell.name]
    assert not found.wrong
    more = {site: why for site, why in found.refused.items() if site not in refused(frozen)}
    assert not more, "refused and not on the frozen list"
    assert set(refused(frozen)) == set(found.refused), f"the frozen list can shrink; {REGENERATE}"
    assert (found.right, found.split) == (frozen["right"], frozen["split"])
    edits, wrong = compare_edits(session, one, cell)
    assert not wrong
    assert edits == frozen["edits"]


@pytest.mark.engines
@pytest.mark.parametrize("column", ["by hand", pytest.param("Llama", marks=pytest.mark.full)])
def test_a_survey_with_one_row_is_good_for_more(session, folder, column):
    """Rows of a batch cannot be told from each other when there is but one; the survey varies it."""
    cell = next(cell for cell in CELLS if cell.name == f"DDP, uneven batch / {column}")
    one = OneProcess(cell, folder)
    cell.load(session, folder)
    session.run({name: value[:1] for name, value in one.inputs.items()})
    found = measure(session, one)
    assert not found.wrong
    assert set(found.refused) == set(refused(results()[cell.name]))


@pytest.mark.engines
@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("row", ["DeepSpeed ZeRO-3", "DeepSpeed ZeRO-3 through Accelerate"])
def test_parameters_that_are_empty_at_rest_are_whole_or_refused(session, folder, row):
    cell = next(cell for cell in CELLS if cell.name == f"{row} / Llama")
    cell.load(session, folder)
    model = OneProcess(cell, folder).model
    for name, whole in model.named_parameters():
        assert torch.equal(session.model.parameter(name), whole), name
    total = sum(whole.nbytes for whole in model.parameters())
    assert all(total / 2 <= own < 0.51 * total for own in session.model.parameter_bytes)


WITH_PARAMETERS = [
    "DeepSpeed AutoTP / Llama",
    "tensor parallel, loaded by path / Mixtral",
    "the same, interleaved columns / GPT-2",
    "the same, interleaved columns / by hand",
    "the same, fewer key-value heads than ranks / Mixtral",
    "TP × FSDP2, loaded by path / Mixtral",
    "TP × FSDP2 by hand, uneven batch / GPT-2",
    "TP × FSDP2 by hand, uneven batch / Mixtral",
    "PP × TP, torch’s schedules / GPT-2",
]


@pytest.mark.engines
@pytest.mark.full
@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS if cell.name in WITH_PARAMETERS])
def test_parameters_are_whole_however_they_are_cut(request, folder, cell):
    """Unevenly, in several spans, one head on several ranks, or cut by hand and sharded once more."""
    session = request.getfixturevalue({2: "session", 4: "four"}[cell.strategy.ranks])
    one = OneProcess(cell, folder)
    cell.load(session, folder)
    session.run(one.inputs)
    for name, whole in one.model.named_parameters():
        assert torch.equal(session.model.parameter(name), whole), name


@pytest.mark.engines
@pytest.mark.full
def test_a_bias_that_one_rank_adds_for_all_is_refused(session, folder):
    cell = next(cell for cell in CELLS if cell.name == "the same, sum deferred / BERT")
    one = OneProcess(cell, folder)
    cell.load(session, folder)
    refused = set()
    for name, whole in one.model.named_parameters():
        try:
            assert torch.equal(session.model.parameter(name), whole), name
        except LayoutError:
            refused.add(name.split(".", 3)[-1])
    assert refused == {"attention.output.dense.bias", "output.dense.bias"}


def test_the_cells_with_parameters_are_there():
    assert set(WITH_PARAMETERS) <= {cell.name for cell in CELLS}


def test_the_frozen_results_are_of_these_cells():
    assert list(results()) == [cell.name for cell in CELLS]


def test_every_place_in_the_table_is_a_cell_or_says_why_not():
    for strategy in STRATEGIES:
        assert set(strategy.columns) <= set(MODELS)
        for column in set(MODELS) - set(strategy.columns):
            assert strategy.pending or strategy.everywhere or strategy.without.get(column), (
                strategy.name,
                column,
            )


def test_every_cell_that_splits_something_shows_that_it_does():
    in_one_piece = ("device_map", "pipeline, ", "the same, and nothing said")
    for cell in CELLS:
        split = results()[cell.name]["split"]
        assert (split == 0) == cell.strategy.name.startswith(in_one_piece), cell.name


def test_every_edit_of_the_table_is_tried_somewhere():
    for model in MODELS:
        tried = {place for cell in CELLS if cell.column == model for place in results()[cell.name]["edits"]}
        assert tried == {place for place, _ in EDITS[model]}


def test_the_readme_shows_the_frozen_results():
    text = README.read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert text == readme_with(table(results())), REGENERATE


def test_a_difference_in_kind_is_no_small_difference():
    x = torch.ones(2, 3)
    assert relative(x, x) == 0
    assert relative(x + 1e-3, x) == pytest.approx(1e-3, rel=1e-3)
    assert relative(x[:1], x) == relative(x.double(), x) == float("inf")
    assert relative(x.int(), x.int()) == 0
    assert relative(x.int(), x.int() + 1) == float("inf")
    assert relative(x * float("nan"), x) != 0
