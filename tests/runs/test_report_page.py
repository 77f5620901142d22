"""The report in a real browser: Chromium without a window."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import embedded, make_run

from vlmenv.runs.report import write_report
from vlmenv.runs.report_server import ReportServer

pytestmark = pytest.mark.slow
HOSTILE = "</script><img src=x onerror=document.title='taken'><b>bold</b>\u202e" + "word " * 200_000 + "THE END"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason='needs the extra "browser"')
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs a browser: {', '.join(names)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("made") / "run", measured=40, on_the_way=3, hostile=HOSTILE)
    (made / "warnings.jsonl").write_text('{"step": 3, "kind": "<i>length</i>", "message": "answers <b>drift</b>"}\n')
    write_report([made], made / "report.html")
    return made


def opened(chromium: Any, address: str, **options: Any) -> Any:
    """A page without a word on its console, and with no request besides its own."""
    page = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options).new_page()
    page.faults = []
    page.on("console", lambda message: page.faults.append(message.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on(
        "request", lambda one: one.url.startswith(("file:", "data:", "http://127.0.0.1")) or page.faults.append(one.url)
    )
    page.goto(address)
    page.wait_for_selector(".cards li")
    return page


@pytest.fixture
def page(chromium: Any, run: Path) -> Iterator[Any]:
    made = opened(chromium, (run / "report.html").as_uri())
    yield made
    assert made.faults == []
    made.context.close()


def status(page: Any) -> str:
    return str(page.get_by_role("status").inner_text())


def test_it_shows_headline_curves_and_warnings(page: Any, run: Path) -> None:
    told = embedded((run / "report.html").read_text())["runs"][0]
    row = page.get_by_role("row", name="iou/mean").inner_text()
    assert f"{told['headline'][0][1][0]:.3f}" in row
    assert f"{told['headline'][0][2][0]:.3f}" in row
    assert "Warning, step 3: <i>length</i>. answers <b>drift</b>" in page.locator(".warning").inner_text()
    titles = page.locator("figure.panel h3").all_inner_texts()
    expected = {"Held-out iou/mean", "Reward", "Reward terms", "Groups that teach nothing", "Loss", "Entropy"}
    assert expected | {"KL divergence", "Length", "Memory"} <= set(titles)
    assert page.locator("line.warned").count() == len(titles)


def test_the_filters_filter(page: Any, run: Path) -> None:
    told = embedded((run / "report.html").read_text())["runs"][0]
    rows = [dict(zip(told["fields"], one, strict=True)) for one in told["completions"]]
    assert status(page) == "40 of 40 samples"
    page.get_by_label("Show").select_option("single")
    assert status(page) == f"{len(rows)} of {len(rows)} completions"
    page.get_by_label("From", exact=True).select_option("3")
    training = [one for one in rows if one["when"] == 3]
    assert status(page).startswith(f"{len(training)} of")
    page.get_by_label("Steps from").fill("2")
    page.locator("input[name=to]").fill("4")
    within = [one for one in training if 2 <= one["step"] <= 4]
    assert status(page).startswith(f"{len(within)} of")
    page.get_by_label("Verdict").select_option("right")
    right = [one for one in within if one["right"]]
    assert status(page).startswith(f"{len(right)} of")
    page.get_by_label("Reward from").fill("0.8")
    high = [one for one in right if one["reward"] >= 0.8]
    assert 0 < len(high) < len(right)
    assert status(page).startswith(f"{len(high)} of")
    assert page.locator(".cards > li").count() == min(24, len(high))
    page.get_by_label("Text contains").fill("nothing at all has this")
    assert status(page).startswith("0 of")


def test_filters_are_in_the_address(page: Any, chromium: Any) -> None:
    page.get_by_label("Show").select_option("single")
    page.get_by_label("Verdict").select_option("wrong")
    again = opened(chromium, page.url)
    assert status(again) == status(page)


def test_before_and_after_begin_with_the_largest_change(page: Any, run: Path) -> None:
    told = embedded((run / "report.html").read_text())["runs"][0]
    rows = [dict(zip(told["fields"], one, strict=True)) for one in told["completions"]]
    scores = {when: {one["sample"]: one["score"] for one in rows if one["when"] == when} for when in (0, 2)}
    change = {sample: scores[2][sample] - scores[0][sample] for sample in scores[0]}
    first = page.locator(".cards > li").first
    shown = told["samples"].index(
        next(s for s in told["samples"] if s["id"] == first.locator(".quiet").first.inner_text())
    )
    assert abs(change[shown]) == max(map(abs, change.values()))
    page.get_by_label("Verdict").select_option("fixed")
    right = {when: {one["sample"]: one["right"] for one in rows if one["when"] == when} for when in (0, 2)}
    fixed = [sample for sample in change if right[2][sample] and not right[0][sample]]
    assert status(page) == f"{len(fixed)} of 40 samples"


def test_boxes_lie_where_they_should(page: Any, run: Path) -> None:
    """On the screen, relative to the picture, to within a pixel."""
    told = embedded((run / "report.html").read_text())["runs"][0]
    rows = [dict(zip(told["fields"], one, strict=True)) for one in told["completions"]]
    card = page.locator(".cards > li").first
    number = next(i for i, s in enumerate(told["samples"]) if s["id"] == card.locator(".quiet").first.inner_text())
    sample = told["samples"][number]
    for side, when in enumerate((0, 2)):
        answer = next(one for one in rows if one["sample"] == number and one["when"] == when)
        picture = card.locator(".picture").nth(side)
        frame = picture.locator("img").bounding_box()
        for kind, places in (("true", sample["true"]), ("answered", answer["places"])):
            marks = picture.locator(f"rect.mark.{kind}")
            assert marks.count() == len(places)
            for i, (_, (x1, y1, x2, y2)) in enumerate(places):
                box = marks.nth(i).evaluate(
                    "one => { const r = one.getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom] }"
                )
                width, height = sample["images"][0]["w"], sample["images"][0]["h"]
                wanted = [frame["x"] + x1 * frame["width"] / width, frame["y"] + y1 * frame["height"] / height]
                wanted += [frame["x"] + x2 * frame["width"] / width, frame["y"] + y2 * frame["height"] / height]
                assert box == pytest.approx(wanted, abs=1)
                place = page.locator("g.place").first
    place.hover()
    assert "pixels" in place.get_attribute("aria-label")


def test_hostile_text_shows_as_text_and_is_cut(page: Any) -> None:
    page.get_by_label("Show").select_option("single")
    page.get_by_label("Text contains").fill("onerror")
    assert status(page).startswith("1 of")
    card = page.locator(".cards > li")
    text = card.locator(".text").filter(has_text="onerror")
    assert text.inner_text().startswith("</script><img src=x onerror=document.title='taken'><b>bold</b>\\u202e")
    assert len(text.inner_text()) < 400
    card.get_by_role("button", name="Show all").click()
    whole = card.locator(".text").filter(has_text="onerror").inner_text()
    assert whole.endswith("THE END")
    assert "characters are left out of this report" in whole
    assert page.title() == "run – vlmenv report"
    assert page.locator("b, i").count() == 0


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phones_and_desks_in_light_and_dark(width: int, scheme: str, chromium: Any, run: Path) -> None:
    page = opened(
        chromium, (run / "report.html").as_uri(), viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background, text = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert contrast(background, text) > 7
    for kind in (".quiet", ".verdict.wrong", ".verdict.right", "nav a", ".legend li"):
        colour = page.locator(kind).first.evaluate("one => getComputedStyle(one).color")
        assert contrast(background, colour) > 4.5, kind
    assert page.faults == []


def contrast(a: str, b: str) -> float:
    """The contrast of two colours by WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_all_is_reached_by_keyboard_and_named_for_screen_readers(page: Any) -> None:
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.name || document.activeElement.tagName"))
    assert {"A", "INPUT", "view", "verdict", "text", "sort", "g"} <= reached
    slider = page.get_by_role("slider", name="Step of Reward", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext").startswith("step 2: mean ")
    assert page.get_by_role("search").count() == 1
    assert page.get_by_role("region", name="Result").count() == 1
    assert page.get_by_role("navigation").count() == 1
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button, svg[role=img]')].filter("
        "(one) => !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).length"
    )
    assert unnamed == 0
    assert page.evaluate("[...document.images].filter((one) => !one.alt).length") == 0


def test_runs_lie_over_each_other(chromium: Any, tmp_path: Path) -> None:
    options = {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 1, "lr": 0.1}}
    runs = [make_run(tmp_path / name, steps=3, measured=4, **one) for name, one in options.items()]  # type: ignore[arg-type]
    write_report(runs, tmp_path / "report.html")
    page = opened(chromium, (tmp_path / "report.html").as_uri())
    reward = page.locator("figure.panel").filter(has=page.get_by_role("heading", name="Reward", exact=True))
    assert reward.locator("path.curve").count() == 2
    assert reward.locator("path.band").count() == 1
    assert page.get_by_role("row", name="lr").first.inner_text().split() == ["lr", "0.0003", "0.0003", "0.1"]
    page.get_by_label("Run", exact=True).select_option("2")
    assert status(page) == "4 of 12 samples"
    assert page.faults == []


def test_a_served_report_follows_its_run(chromium: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, measured=2)
    with ReportServer([run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = opened(chromium, server.url)
        page.clock.install()
        page.reload()
        page.clock.run_for(10_500)
        page.wait_for_timeout(300)
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 3, "loss": 0.5, "reward/mean": 0.5}\n')
        with page.expect_navigation():
            page.clock.run_for(10_500)
        page.wait_for_selector("figure.panel")
        assert "3 steps" in page.locator("#subtitle").inner_text() or "3 of" in page.locator("#subtitle").inner_text()
        assert page.faults == []
        refused = page.request.get(server.url.replace("127.0.0.1", "localhost"), headers={"Host": "evil.example"})
        assert refused.status == 403
        assert page.request.post(server.url).status == 501
        server.shutdown()
