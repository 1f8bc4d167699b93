"""What a terminal would show of what code writes, and what stands there for what is displayed."""

import io

import pytest
from tqdm import tqdm

from flexmagic.engine.screen import Bundle, Screen, alike, bar_in, marked


@pytest.fixture
def screen():
    return Screen()


def bars(screen, *sizes, leave=True, position=0):
    """Bars in bars, as tqdm draws them on a terminal."""
    if not sizes:
        return
    stream = io.StringIO()
    stream.write = screen.write
    size, *inner = sizes
    for _ in tqdm(range(size), desc=f"of {size}", file=stream, mininterval=0, leave=leave, position=position):
        bars(screen, *inner, leave=False, position=position + 1)


def test_plain_text_stays_as_it_is(screen):
    for text in ("a\nb", " c\n", "  indented  \n\n"):
        screen.write(text)
    assert screen.getvalue() == "a\nb c\n  indented  \n\n"
    assert screen.settled() == "a\nb c\n  indented  \n\n"


def test_a_bar_is_one_line_as_it_ended(screen):
    bars(screen, 300)
    screen.write("done\n")
    bar, after, nothing = screen.getvalue().split("\n")
    assert bar.startswith("of 300: 100%|")
    assert "300/300 [" in bar
    assert (after, nothing) == ("done", "")
    assert screen.bar() is None


def test_bars_in_a_bar_leave_one_line(screen):
    bars(screen, 3, 5)
    lines = [line for line in screen.getvalue().split("\n") if line]
    assert len(lines) == 1
    assert "3/3 [" in lines[0]


def test_a_bar_that_is_drawn_is_told_as_numbers_and_not_as_a_line(screen):
    screen.write("before\n")
    screen.write("\rtrain:   0%|          | 0/40 [00:00<?, ?it/s]")
    screen.write("\rtrain:  30%|###       | 12/40 [00:01<00:03,  9.81it/s, loss=0.3]")
    assert screen.bar() == ("train", 12, 40)
    screen.write("\n\rinner:  50%|#####     | 1/2 [00:01<00:03,  9.81it/s]")
    assert screen.settled() == "before\n", "the first bar is not at its end"
    assert bar_in("40%") is None


def test_what_only_times_tell_apart_is_alike():
    one = "train: 100%|##########| 40/40 [00:01<00:00,  9.81it/s, loss=0.3]"
    assert alike(one) == alike(one.replace("00:01<00:00,  9.81it/s", "01:02<00:00,  1.20s/it"))
    assert alike(one) != alike(one.replace("0.3", "0.4"))
    assert alike(one) != alike(one.replace("40/40", "39/40"))
    assert alike("loss 0.3 [00:01<00:00, 9it/s]") == "loss 0.3 [00:01<00:00, 9it/s]", "this is no bar"


def test_what_is_displayed_is_a_line_of_its_own(screen):
    red = Bundle({"text/plain": "<HTML at 0x1>", "text/html": "<b>red</b>"})
    same = Bundle({"text/plain": "<HTML at 0x2>", "text/html": "<b>red</b>"})
    blue = Bundle({"text/plain": "<HTML at 0x1>", "text/html": "<b>blue</b>"})
    screen.write("unfinished")
    screen.place(7, red)
    before, mark, after = screen.getvalue().split("\n")
    assert (before, after) == ("unfinished", "")
    assert marked(mark) == 7
    assert marked(before) is None
    assert screen.shown == {7: red}
    assert red.mark(7) == same.mark(7) != blue.mark(7)
