from __future__ import annotations

import json

import pytest
from growth import growth
from hypothesis import given
from hypothesis import strategies as st

from vlmenv.core.answers import (
    NONE,
    Detection,
    is_exact_box,
    is_exact_detections,
    parse_box,
    parse_detections,
    write_box,
)
from vlmenv.core.formats import AnswerFormat, extract_answer, is_think_answer

pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "[",
        "]",
        "1",
        "2.5",
        ",",
        " ",
        "-",
        "None",
        "```json",
        "{",
        "}",
        "é",
        "\ud800",
        "(",
        ")",
        "'",
        '"',
        ":",
        "bbox_2d",
        "label",
        "x1",
        "//",
        "/*",
        "#",
        "\\",
        "\n",
        "### The final answer is:",
    ]
)
texts = st.one_of(st.text(st.characters()), st.lists(pieces, max_size=40).map("".join))


BOX = (100.0, 100.0, 200.0, 200.0)
TRUTH = (Detection("cat", BOX), Detection("dog", (300.0, 300.0, 400.0, 400.0)))

ONE_BOX = r"""
[100,100,200,200]
[ 100 , 100.0 , +200 , 200. ]
[0100,0100,0200,0200]
[100.00000000000000001,100,200,200]
[1e2,1e2,2e2,2e2]
[[100,100,200,200]]
[[100, 100], [200, 200]]
["100","100","200","200"]
[100 100 200 200]
[100; 100; 200; 200]
[100px, 100px, 200px, 200px]
[100,100,200,200,]
(100,100,200,200)
((100,100),(200,200))
(100, 100), (200, 200)
(100,100) to (200,200)
Top-left: (100, 100), bottom-right: (200, 200)
{100,100,200,200}
{"bbox_2d": [100,100,200,200], "label": "cat"}
[{"bbox_2d": [100,100,200,200], "label": "cat"},]
{"bbox": [100,100,200,200]}
{"box": [100,100,200,200]}
{"box_2d": [100,100,200,200]}
{"boundingBox": [100,100,200,200]}
{"bounding box": [100,100,200,200]}
{"coordinates": [100,100,200,200]}
{"bbox_2d": [[100,100,200,200]]}
{"bbox_2d": [[100,100],[200,200]]}
{"bbox_2d": "[100,100,200,200]"}
{"bbox_2d": "(100,100),(200,200)"}
{'bbox_2d': (100,100,200,200), 'label': "dog's bowl"}
{'bbox_2d': [100,100,200,200], 'label': 'dog's bowl'}
{bbox_2d: [100,100,200,200], label: cat}
{"bbox_2d": [100,100,200,200], "visible": True, "label": None}
{"point_2d": [150,150], "bbox_2d": [100,100,200,200]}
{"image_size": [0,0,640,480], "bbox_2d": [100,100,200,200]}
{"bbox_2d": [100,100,200,200] "label": "cat"}
{"bbox_2d": [100,100,200,200], "label": "ca
[{"bbox_2d": [100,100,200,200], "label": "cat"}
{"x_min": 100, "y_min": 100, "x_max": 200, "y_max": 200}
{"xMin": 100, "yMin": 100, "xMax": 200, "yMax": 200}
{"x2": "200", "y2": "200", "x1": "100", "y1": "100"}
{"x0": 100, "y0": 100, "x1": 200, "y1": 200}
{"left": 100, "top": 100, "right": 200, "bottom": 200}
{"x": 100, "y": 100, "width": 100, "height": 100}
{"top_left": [100,100], "bottom_right": [200,200]}
{"top_left": {"x": 100, "y": 100}, "bottom_right": {"x": 200, "y": 200}}
{"bbox": {"x1": 100, "y1": 100, "x2": 200, "y2": 200}}
{"objects": [{"bbox_2d": [100,100,200,200], "label": "cat"}]}
{"result": {"detections": [{"box": [100,100,200,200]}]}}
{"answer": [100,100,200,200]}
<|box_start|>(100,100),(200,200)<|box_end|>
<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,100),(200,200)<|box_end|>
the cat(100,100),(200,200)
<ref>the cat</ref><box>(100,100),(200,200)</box>
<ref>the cat</ref><box>[[100,100,200,200]]</box>
<box>100 100 200 200</box>
<|ref|>the cat<|/ref|><|det|>[[100, 100, 200, 200]]<|/det|>
<|begin_of_box|>[[100,100,200,200]]<|end_of_box|>
\boxed{[100,100,200,200]}
\[ \left[100, 100, 200, 200\right] \]
**[100, 100, 200, 200]**
`[100, 100, 200, 200]`
[100，100，200，200]
［１００，100，200，200］
[x1=100, y1=100, x2=200, y2=200]
x1=100, y1=100, x2=200, y2=200
- **x1**: 100⏎- **y1**: 100⏎- **x2**: 200⏎- **y2**: 200
100, 100, 200, 200
The bounding box of the dog's bowl is [100, 100, 200, 200].
The dog (the left one, 3 of 5) is at [100, 100, 200, 200].
It is 5" wide (about 3 feet): [100, 100, 200, 200].
- label: cat⏎  bbox_2d: [100, 100, 200, 200]
[100,100,200,200], so [100.0,100,200,200]
The box is [1,2,30,40].⏎```json⏎{"bbox_2d": [100,100,200,200]}⏎```
```JSON⏎[{"bbox_2d": [100,100,200,200]}]⏎```
```⏎[100,100,200,200]⏎```
```python⏎bbox = [100,100,200,200]⏎```
```json⏎[100,100,200,200]
Sure! Here it is:⏎⏎```json⏎{"bbox_2d": [100,100,200,200]}⏎```⏎⏎Hope this helps [1].
{// the cat⏎"bbox_2d": [100,100,200,200]}
{"bbox_2d": [100,100,200,200], # the cat⏎"label": "cat"}
{"bbox_2d": /* in pixels */ [100,100,200,200]}
{“bbox_2d”: [100,100,200,200], “label”: “cat”}
{"bbox_2d": [100,100,200,200], "label": "sign [1, 2, 3, 4]"}
[{'bbox_2d': [100,100,200,200], 'label': 'sign [1, 2, 3, 4], }'}]
["cat", [100,100,200,200]]
("cat", (100,100,200,200))
[100,100,200,200,"cat"]
{"bbox_2d": [100, 100, 200, 200]}{"bbox_2d": [100, 100, 200, 200]}
"""

NO_BOXES = r"""
None
none.
"None"
**None**
```⏎None⏎```
```json⏎[]⏎```
[]
null
\boxed{\text{None}}
<|begin_of_box|>None<|end_of_box|>
{"bbox_2d": null}
{"objects": []}
[{'bbox_2d': None, 'label': 'cat'}]
None⏎There is no such thing.
I looked everywhere.⏎None
"""

NO_ANSWERS = r"""
[1,2,3]
[1,2,3,4,5]
[3,2,1,4]
[1,2,1,4]
[nan,0,1,1]
[0,0,1e308,1]
[0,0,99999999,1]
[1,2,3,4] or [5,6,7,8]
[1, 2, 3, 4
(1,2),(3,4
(1,2)
(1,2) or (3,4)
(1,2),(3,4),(5,6),(7,8)
1, 2, 3
1, 2, 3, 4, 5
[١, ٢, ٣, ٤]
there is none of them
{}
7
{"bbox_2d": [1,2,3,4
{"bbox_2d": [4,3,2,1]}
{"bbox_2d": [1,2,3]}
{"bbox_2d": [true,2,3,4]}
{"bbox_2d": "cat"}
{"bbox_2d": [[1,2,3,4],[5,6,7,8]]}
[{"bbox_2d":[1,2,3,4]},{"bbox_2d":[5,6,7,8]}]
{"x1":1,"y1":2,"x2":3,"y2":4} {"x1":1,"y1":2,"x2":3,"y2":5}
<box>[[1,2,3,4],[5,6,7,8]]</box>
[[1,2],[3,4],[5,6]]
{"x1": 1, "y1": 2}
"""

TWO_BOXES = r"""
[{"bbox_2d": [100,100,200,200], "label": "cat"}, {"bbox_2d": [300,300,400,400], "label": "dog"}]
{"bbox_2d": [100,100,200,200], "label": "cat"}, {"bbox_2d": [300,300,400,400], "label": "dog"}
{"bbox_2d": [100,100,200,200], "label": "cat"}⏎{"bbox_2d": [300,300,400,400], "label": "dog"}
```json⏎{"bbox_2d": [100,100,200,200], "label": "cat"}⏎```⏎```json⏎{"bbox_2d": [300,300,400,400], "label": "dog"}⏎```
Here are [2]:⏎```JSON⏎[{"bbox": [100,100,200,200], "label": "cat"}, {"bbox": [300,300,400,400], "label": "dog"}]⏎```
[{'bbox_2d': [100,100,200,200], 'label': 'cat'}, {'bbox_2d': [300,300,400,400], 'label': 'dog'}]
[{"category": "cat", "box_2d": [100,100,200,200]}, {"class": "dog", "box": [300,300,400,400],},]
[{"label": "cat", "x_min": 100, "y_min": 100, "x_max": 200, "y_max": 200}, {"dog": {"box": [300,300,400,400]}}]
{"objects": [{"bbox_2d": [100,100,200,200], "label": "cat"}, {"bbox_2d": [300,300,400,400], "label": "dog"}]}
{"cat": [100,100,200,200], "dog": [[300,300,400,400]]}
{"boxes": [[100,100,200,200], [300,300,400,400]], "labels": ["cat", "dog"]}
[{"bbox_2d": ["100",100,200,200], "label": " cat "}, {"bbox": [300,300,400,400], "label": "dog", "point_2d": [9,9]}]
[{"bbox_2d": [100,100,200,200], "label": "cat"}, {"bbox_2d": [300,300,400,400], "label": "dog"}, {"bbox_2d": [5
[{"bbox_2d": [100,100,200,200], "label": "cat"}, {"bbox": [300,300,400,400], "label": "dog"}, {"bbox_2d": [5,5,6,6], "la
[{"bbox_2d": [100,100,200,200], "label": "cat"} {"bbox_2d": [300,300,400,400], "label": "dog"}]
[⏎ # one⏎ {"bbox_2d": [100,100,200,200], "label": "cat"}, // two⏎ {"bbox_2d": [300,300,400,400], "label": "dog"}⏎]
<ref>cat</ref><box>[[100,100,200,200]]</box><ref>dog</ref><box>[[300,300,400,400]]</box>
<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,100),(200,200)<|box_end|> <ref>dog</ref>(300,300),(400,400)
cat(100,100),(200,200)⏎dog(300,300),(400,400)
1. **cat**: [100,100,200,200]⏎2. **dog**: [300,300,400,400]
- label: cat⏎  bbox_2d: [100,100,200,200]⏎- label: dog⏎  bbox_2d: [300,300,400,400]
[["cat", [100,100,200,200]], ("dog", 300, 300, 400, 400)]
[{"bbox_2d": [100,100,200,200], "label": "cat"}, {bbox: [300,300,400,400], label: dog}, {"bbox": null, "label": "elk"}]
"""


def lines(texts: str) -> list[str]:
    return [line.replace("⏎", "\n") for line in texts.strip().splitlines()]


@pytest.mark.parametrize("content", lines(ONE_BOX))
def test_a_box_is_read_however_it_is_written(content: str) -> None:
    assert parse_box(content) == BOX


@pytest.mark.parametrize("content", lines(NO_BOXES))
def test_none_is_read_however_it_is_written(content: str) -> None:
    assert parse_box(content) == NONE
    assert parse_detections(content) == ()


@pytest.mark.parametrize("content", ["", "[0, 0, 1" + "0" * 400 + ", 1]", *lines(NO_ANSWERS)])
def test_what_gives_no_box_or_several_is_no_box(content: str) -> None:
    assert parse_box(content) is None


@pytest.mark.parametrize("content", lines(TWO_BOXES))
def test_labelled_boxes_are_read_however_they_are_written(content: str) -> None:
    assert parse_detections(content) == TRUTH
    assert parse_box(content) is None


@pytest.mark.parametrize(
    "label",
    [
        *("sign [1]", "a, ]", "x, }", "[1,2,3,4]", "dog's", 'say "hi", ok', "```", '{"bbox_2d": [1,2,3,4]}', "a\\b"),
        *("猫", "# 3", "// x", "/* y", "None", "3", "a: b", "＃１", ""),
    ],
)
def test_labels_stay_as_they_are(label: str) -> None:
    row = {"bbox_2d": [100, 100, 200, 200], "label": label}
    for content in (json.dumps([row]), json.dumps([row])[:-1] + ",]", repr(row), f"See: {row}", f"{row}\n{row}"):
        read = parse_detections(content)
        assert read is not None
        assert set(read) == {Detection(label, BOX)}
        assert parse_box(content) == BOX


def test_fractions_are_read_as_they_are_written() -> None:
    """They are neither pixels nor thousandths, and are not made into such."""
    for name in ("x_min y_min x_max y_max", "x1 y1 x2 y2"):
        content = json.dumps(dict(zip(name.split(), (0.1, 0.25, 0.5, 0.75), strict=True)))
        assert parse_box(content) == (0.1, 0.25, 0.5, 0.75)
        assert parse_detections(content[:-1] + ', "label": "cat"}') == (Detection("cat", (0.1, 0.25, 0.5, 0.75)),)


@pytest.mark.parametrize(
    ("content", "box", "detections"),
    [
        ("[1, 2, 3, 4]", True, False),
        ('{"bbox_2d": [1, 2, 3, 4.5]}', True, False),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\n```', True, True),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, {"bbox_2d": [1, 2, 3, 4], "label": "dog"}]', False, True),
        ("None", True, True),
        ("```\nNone\n```", True, True),
        ("[]", False, True),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', True, False),
        ("The box is [1, 2, 3, 4].", False, False),
        ("[1, 2, 3, 4,]", False, False),
        ("(1, 2, 3, 4)", False, False),
        ("[3, 2, 1, 4]", False, False),
        ("{'bbox_2d': [1, 2, 3, 4], 'label': 'cat'}", False, False),
        ('[{"bbox": [1, 2, 3, 4], "label": "cat"}]', False, False),
        ('[{"bbox_2d": ["1", 2, 3, 4], "label": "cat"}]', False, False),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]\nThat is all.', False, False),
        ("", False, False),
    ],
)
def test_the_exact_form_is_stricter(content: str, box: bool, detections: bool) -> None:
    assert is_exact_box(content) is box
    assert is_exact_detections(content) is detections


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", "b"),
        ("\n <think>a</think>\n<answer>b</answer>\n", "b"),
        ("<answer>b</answer>", "b"),
        ("a thought that the prompt began</think><answer>b</answer>", "b"),
        ("<think>a</think><answer>b", "b"),
        ("<think>a</think>b", "b"),
        ("<think>a</think>b</answer>", "b"),
        ("<think>a</think>so: <answer>b</answer>\nDone.", "b"),
        ("<think>a</think><answer>b</answer><think>c", "b"),
        ("<think>in <think> mode</think><answer>b</answer>", "b"),
        ("<think>not </think> yet</think><answer>b</answer>", "b"),
        ("<think><answer>b</answer></think>", None),
        ("<think><answer>c</answer></think><answer>b</answer>", "b"),
        ("<think>a</think><answer>b</answer><answer>b</answer>", None),
        ("<think>a</think><answer>b</answer><think>a</think><answer>b</answer>", None),
        ("<think>use <think>x</think><answer>y</answer>, so</think><answer>b</answer>", "b"),
        ("I will say <answer>c</answer> in tags. <answer>b</answer>", "b"),
        ("b", None),
        ("<think>a<answer>b</answer>", None),
        ("<think>a</think><think><answer>b</answer>", None),
        ("a</think><think><answer>b</answer>", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think>a</think><answer><answer>b</answer></answer>", None),
        ("<think>a</think>", None),
        ("<answer>b</answer><think>a</think>", None),
        ("<think>a</think></answer>b<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" <think>a</think>\n\n<answer>b</answer>\n", True),
        ("<think></think><answer></answer>", True),
        ("so <think>a</think><answer>b</answer>", False),
        ("<think>a</think> so <answer>b</answer>", False),
        ("<think>a</think><answer>b</answer>.", False),
        ("<think><think>a</think></think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>b</answer>", False),
        ("<think>a<answer>b</answer></think>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<answer>b</answer>", False),
    ],
)
def test_is_think_answer(text: str, expected: bool) -> None:
    assert is_think_answer(text) is expected


@given(texts)
def test_no_text_raises(text: str) -> None:
    for answer_format in AnswerFormat:
        answer_format.extract(text)
        answer_format.is_followed(text)
    parse_box(text)
    parse_detections(text)
    is_exact_box(text)
    is_exact_detections(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000_000,
        "[1,2,3,4]" * 1_000_000,
        "[1,2,3,4," * 1_000_000,
        "[" + "1" * 10_000_000,
        "[]" * 5_000_000,
        "[a]" * 3_000_000,
        "<answer>" * 1_000_000,
        " " * 10_000_000,
    ],
    ids=["brackets", "boxes", "unclosed", "digits", "empty", "lists", "tags", "spaces"],
)
def test_ten_megabytes_do_not_hold_up_a_step(text: str) -> None:
    def read(size: int) -> None:
        part = text[:size]
        is_think_answer(part)
        extract_answer(part)
        parse_box(part)
        parse_detections(part)
        extract_answer(f"<answer>{part}</answer>")
        AnswerFormat.SECTIONS.extract(part)

    assert growth(read, len(text) // 8, tries=2) < 24


def test_what_is_written_is_read() -> None:
    text = AnswerFormat.TAGS.write(write_box((1.2, 2, 30, 44.7)), "the red one")
    assert is_think_answer(text)
    content = extract_answer(text)
    assert content is not None
    assert parse_box(content) == (1, 2, 30, 45)
    assert write_box(NONE) == "None"
