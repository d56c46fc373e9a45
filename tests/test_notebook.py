"""What commands return is what it was, and a notebook shows it."""

import copy
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leanmim
from leanmim import notebook, progress
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.evaluate import Evaluation, Result
from leanmim.notebook import Pairs, Place, Text, displayed
from tests.helpers import PHOTOS
from tests.page.pages import PIXEL, Page, full, tuned


def shown(value: object, folder: Path) -> Page:
    """What a notebook shows, whose tags are all closed; nothing is loaded from elsewhere."""
    html = value._repr_html_()  # type: ignore[attr-defined]
    (folder / "shown.html").write_text(html)
    page = Page(folder / "shown.html")
    assert all(link.startswith("data:") for link in page.links)
    assert "\n\n" not in html  # or Markdown around it would end it
    return page


def test_a_path_stays_a_path() -> None:
    place = displayed(Path("runs/a"))
    assert isinstance(place, Path) and place == Path("runs/a") and hash(place) == hash(Path("runs/a"))
    assert str(place) == "runs/a" and place / "b" == Path("runs/a/b") and place.name == "a"
    assert pickle.loads(pickle.dumps(place)) == copy.copy(place) == place
    assert place._repr_html_() is None  # there is nothing


def test_a_run_of_pretraining_shows_loss_picture_and_places(tmp_path: Path) -> None:
    run = Place(full(tmp_path / "run"))
    page = shown(run, tmp_path)
    assert "circle" in page.charts["loss"] and "circle" in page.charts["online kNN accuracy (%)"]
    assert "learning rate (10⁻³)" not in page.charts
    assert page.row("reconstructions") == ["reconstructions", str(run / "reconstructions.png")]
    assert "mae" in page.text and "loss 0.2000" in page.text and "kNN 87.5 %" in page.text
    assert len(page.links) == 1  # the picture


def test_a_run_that_has_just_begun_shows_what_there_is(tmp_path: Path) -> None:
    full(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "reconstructions.png").unlink()
    page = shown(Place(tmp_path / "run"), tmp_path)
    assert not page.charts and not page.links and "mae" in page.text


def test_a_run_of_finetuning_shows_accuracy_and_losses(tmp_path: Path) -> None:
    page = shown(Place(tuned(tmp_path / "tuned")), tmp_path)
    assert list(page.charts) == ["validation top-1 accuracy (%)", "validation loss", "training loss"]
    assert "accuracy 75.0 (30.1 to 95.4) %" in page.text
    assert page.row("the surest mistakes")


def test_pictures_and_tables_are_shown(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PIXEL)
    assert shown(Place(tmp_path / "a.png"), tmp_path).links
    (tmp_path / "damaged.png").write_bytes(PIXEL[:20])
    assert Place(tmp_path / "damaged.png")._repr_html_() is None
    rows = [f"{PHOTOS / 'cat.jpg'},cat,0.91234,dog,0.08,cow,0.01", *["<gone>.jpg,dog,1.0,cat,0.0,cow,0.0"] * 7]
    head = "path,class,probability,class_2,probability_2,class_3,probability_3"
    (tmp_path / "a.csv").write_text("\n".join([head, *rows]))
    page = shown(Place(tmp_path / "a.csv"), tmp_path)
    cat = str(PHOTOS / "cat.jpg")
    assert page.row(cat) == [cat, "cat", "0.912", "dog", "0.080"]
    assert len(page.links) == 1 and len(page.rows) == 1 + notebook.ROWS
    assert "and 2 more in" in page.text and "<gone>.jpg" in page.text


def counting(log: list[str]) -> Iterator[tuple[str, Accuracy]]:
    for name, right in (("pretrained", 60), ("random", 40)):
        log.append(name)
        yield name, Accuracy(right, 100)


def test_pairs_are_found_when_asked_for_and_stay(tmp_path: Path) -> None:
    log: list[str] = []
    pairs = displayed(counting(log))
    assert isinstance(pairs, Iterator) and log == []
    assert next(pairs) == ("pretrained", 0.6) and log == ["pretrained"]
    assert dict(pairs) == dict(pairs) == {"pretrained": 0.6, "random": 0.4}
    assert log == ["pretrained", "random"] and next(pairs, None) is None
    page = shown(pairs, tmp_path)
    assert page.row("pretrained") == ["pretrained", "60.0 %", "50.2 to 69.1 %", "100"]
    assert repr(pairs).splitlines()[1] == "random: 40.0 % (95 % interval 30.9 to 49.8, 100 images)"


def test_an_error_among_pairs_is_raised() -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield "mae", "a plan"
        raise UserError("too large")

    with pytest.raises(UserError, match="too large"):
        Pairs(broken())._repr_html_()


def test_in_a_notebook_pairs_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    log: list[str] = []
    displayed(counting(log))
    assert log == ["pretrained", "random"]


def test_a_plan_is_shown_with_its_commands(tmp_path: Path) -> None:
    pairs = [("2 images", "vit, 1 GiB"), ("mae", "4 epochs\n  leanmim pretrain mae --data <here>")]
    page = shown(Pairs(iter(pairs)), tmp_path)
    assert page.row("mae")[1] == "4 epochsleanmim pretrain mae --data <here>"
    assert "<code>leanmim pretrain mae --data &lt;here&gt;</code>" in page.source


def test_an_evaluation_is_shown_as_a_table(tmp_path: Path) -> None:
    accuracies = {"pretrained": Accuracy(3, 4), "random": Accuracy(1, 4)}
    found = Evaluation("run on data", [Result((0, 5), "kNN, k = 5", name, own) for name, own in accuracies.items()])
    page = shown(found, tmp_path)
    assert page.row("kNN, k = 5") == ["kNN, k = 5", "75.0 (30.1-95.4)", "25.0 (4.6-69.9)"]
    assert "Wilson" in page.text and "run on data" in page.text


def test_a_cost_is_text_that_is_shown_as_tables(tmp_path: Path) -> None:
    model = dict(model="vit_tiny_patch16_224", model_kwargs={"depth": 1}, input_size=32, batch_size=2)
    cost = leanmim.cost(recipes=("mae", "mae:mask-ratio=0.5"), **model)
    assert isinstance(cost, str) and isinstance(cost, Text) and "Training, GFLOP an image" in cost
    page = shown(cost, tmp_path)
    assert [row[2] for _, row in page.rows if row[0] == "mae"] == ["1.00"] * 3
    assert len(page.rows) == 3 * 3


class Cell:
    """Outputs below a cell, each replaced in place."""

    def __init__(self) -> None:
        self.outputs: list[str] = []

    def display(self, html: str, display_id: bool) -> "Cell":
        assert display_id
        self.outputs.append(html)
        return self

    def update(self, html: str) -> None:
        self.outputs[-1] = html


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """As if a notebook's cell ran this."""
    own = Cell()
    modules = {
        "IPython": type("IPython", (), {}),
        "IPython.display": type("D", (), {"HTML": str, "display": own.display}),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does
    monkeypatch.setattr(progress, "PAUSE", -1.0)
    return own


def test_a_bar_in_a_notebook_moves_in_one_place(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(progress.console_of(), transient=False) as bar:
        task = bar.add_task("a \\[bracket", total=4, text="")
        for done in range(5):
            bar.update(task, completed=done, text=f"<{done}>")
    assert cell.outputs == ['<div>a [bracket <progress value="1.000"></progress> &lt;4&gt;</div>']
    assert capsys.readouterr() == ("", "")


def test_what_is_transient_leaves_nothing_in_a_notebook(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track("abc", "letters", 3)) == ["a", "b", "c"]
    with progress.working("measuring"):
        assert cell.outputs == ["", "<div>measuring <progress></progress> </div>"]
    assert cell.outputs == ["", ""]
    assert capsys.readouterr() == ("", "")


def test_in_a_notebook_lines_go_to_the_standard_output(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    progress.console_of(stderr=True).print("[a] line")
    assert capsys.readouterr() == ("[a] line\n", "")


def test_in_a_notebook_texts_of_tables_are_texts(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    model = dict(model="vit_tiny_patch16_224", model_kwargs={"depth": 1}, input_size=32, batch_size=2)
    cost = leanmim.cost(recipes="mae", **model)
    assert "mae" in cost and "\x1b" not in cost
    found = Evaluation("run on data", [Result((0, 5), "kNN, k = 5", "pretrained", Accuracy(3, 4))])
    assert "kNN, k = 5" in str(found)
    assert capsys.readouterr() == ("", "") and cell.outputs in ([], [""])


def test_a_users_error_in_a_notebook_is_its_message() -> None:
    assert UserError("give --data")._render_traceback_() == ["UserError: give --data"]
