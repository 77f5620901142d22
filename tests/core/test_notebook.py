from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import gymnasium
import numpy as np
import pytest
from PIL import Image

import vlmenv  # noqa: F401 (registers the environments)
from vlmenv.core import console, notebook

HOSTILE = "</pre><script>alert(1)</script>\u202e\x1b[31m\ud800"


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "html", [notebook.text_block(HOSTILE), notebook.table(HOSTILE, (HOSTILE,), [(HOSTILE,)])], ids=["block", "table"]
)
def test_text_stays_text(html: str) -> None:
    page = Tags(html)
    assert "script" not in page.found
    assert "<script>alert(1)</script>" in page.text
    assert "\\u202e" in page.text
    html.encode()  # a lone surrogate could not be sent to a browser


def test_long_texts_lose_their_end() -> None:
    assert "(8000 more characters)" in notebook.text_block("a" * 10_000)


def test_pictures_are_small() -> None:
    html = notebook.picture(np.zeros((1000, 4000, 3), np.uint8), "it")
    found = re.search("base64,([^']*)'", html)
    assert found
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        assert image.size == (320, 80)


def test_an_environment_shows_itself_in_a_notebook() -> None:
    env = gymnasium.make("VLM-REC-v0").unwrapped
    assert "img" not in Tags(env._repr_html_()).found
    env.reset(seed=0)
    env.step("<answer>[1, 2, 30, 40]</answer>" + HOSTILE)
    page = Tags(env._repr_html_())
    assert page.found.count("img") == 1
    assert "script" not in page.found
    for text in ("iou 1, format 0.1", "prompt: ", "answer: <answer>[1, 2, 30, 40]</answer>", "reward: "):
        assert text in page.text


def test_missing_widgets_are_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    console._advise_widgets.cache_clear()
    for _ in range(3):
        opened = console.open_console()
        opened.print("line")
    assert capsys.readouterr().out.count("ipywidgets") == 1
