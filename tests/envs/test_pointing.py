"""`VLM-Point-v0`: forms of points, regions that they hit, and their matching one to one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.points import parse_points
from vlmenv.envs.pointing import PointEnv
from vlmenv.envs.regions import holds, outlines_of_mask, read_regions, shape_of, write_inner_point
from vlmenv.envs.rewards.points import Pointing, count_hits, is_exact_points, point_f1_reward

PICTURE = Image.new("RGB", (400, 300))
REACH = (10.0, 10.0)


@pytest.mark.parametrize(
    ("content", "points", "exact"),
    [
        ("[[1,2],[3.5,4]]", ((1, 2), (3.5, 4)), True),
        ("[1, 2]", ((1, 2),), True),
        ("(1, 2)", ((1, 2),), False),
        ("None", (), True),
        ("[]", (), False),
        ('<point x="61.5" y="40.4" alt="a hill">a hill</point>', ((61.5, 40.4),), True),
        ('<points x1="1.5" y1="2" x2="3" y2="4.0" alt="dogs">dogs</points>', ((1.5, 2), (3, 4)), True),
        ('They are <points x1="1" y1="2" x2="3" y2="4" alt="dogs">dogs</points>.', ((1, 2), (3, 4)), False),
        ('<points y1="2" x1="1" alt="x9 y9">x</points>', ((1, 2),), True),
        ('<point x=" 20.1" y=" 3" alt="c">c</point>', ((20.1, 3),), True),
        ("<point x='1' y='2' alt='x2=5 y2'>c</point>", ((1, 2),), True),
        ("""<points x1="1" y1="2" alt="cat x1='9' y1='9'">c</points>""", ((1, 2),), True),
        ('{"points": [{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]}', ((1, 2), (3, 4)), False),
        ('```json\n[{"point_2d": [1, 2], "label": "dog"}, {"point_2d": [3, 4]}]\n```', ((1, 2), (3, 4)), True),
        ('{"point_2d": [1, 2]}', ((1, 2),), True),
        ("{'x': 1, 'y': 2}", ((1, 2),), False),
        ('[{"x": 1, "y": 2, "label": "dog"}, {"x": "3", "y": "4"},]', ((1, 2), (3, 4)), False),
        ('{"point": {"x": 1, "y": 2}}', ((1, 2),), False),
        ('{"point_2d": ["1", "2"]}', ((1, 2),), False),
        ('{"point_2d": "1, 2"}', ((1, 2),), False),
        ('{"points": {"x": [1, 3], "y": [2, 4]}}', ((1, 2), (3, 4)), False),
        ('{"point_2d": [1, 2], "color": [255, 0, 0]}', ((1, 2),), True),
        ('{"image_size": [640, 480], "point_2d": [1, 2]}', ((1, 2),), True),
        ('{"points": []}', (), False),
        ('{"point_2d": null}', (), False),
        ("<point>1 2</point>", ((1, 2),), False),
        ("<point>[[1, 2]]</point> <point>(3, 4)</point>", ((1, 2), (3, 4)), False),
        ("x=1, y=2", ((1, 2),), False),
        ("1, 2", ((1, 2),), False),
        ("1, 2, 3", None, False),
        ("1 of 2", None, False),
        ("<points></points>", None, False),
        ("<point>a dog</point>", None, False),
        ("<point>1 2 3</point>", None, False),
        ('{"x": 1, "y": 2, "width": 3, "height": 4}', None, False),
        ('{"point_2d": [1, 2, 3]} [1, 2]', None, False),
        ('{"bbox_2d": [1, 2, 3, 4]}', None, False),
        ('<points x1="1" y1="2" x2="3">dogs</points>', None, False),
        ('<point x="1e999" y="2">', None, False),
        ("[1, 2, 3]", None, False),
        ("left", None, False),
        ("[[1e308, 2]]", None, False),
        ("[[" + "9" * 500 + ", 2]]", None, False),
    ],
)
def test_points_that_are_read(content: str, points: tuple[tuple[float, float], ...] | None, exact: bool) -> None:
    assert parse_points(content) == points
    assert is_exact_points(content) is exact


@pytest.mark.parametrize(
    ("region", "point", "hit"),
    [
        ((50, 50), (59, 50), True),
        ((50, 50), (61, 50), False),
        ((50, 50), (57.1, 57.1), False),
        ((10, 20, 30, 40), (30, 40), True),
        ((10, 20, 30, 40), (30.1, 40), False),
        ((0, 0, 10, 0, 0, 10), (2, 2), True),
        ((0, 0, 10, 0, 0, 10), (5, 5), True),
        ((0, 0, 10, 0, 0, 10), (6, 6), False),
        (((0, 0, 10, 0, 10, 10, 0, 10), (4, 4, 6, 4, 6, 6, 4, 6)), (5, 5), False),  # in the hole
        (((0, 0, 10, 0, 10, 10, 0, 10), (4, 4, 6, 4, 6, 6, 4, 6)), (2, 5), True),
    ],
)
def test_what_is_hit(region: Any, point: tuple[float, float], hit: bool) -> None:
    assert holds(region, np.array([point]), REACH).tolist() == [hit]


BOXES = [[0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 100, 300]]


@pytest.mark.parametrize(
    ("answer", "true", "f1", "everything", "count"),
    [
        ("[[50,50],[250,50],[50,250]]", BOXES, 1, 1, 1),
        ("[[50,250],[50,50],[250,50]]", BOXES, 1, 1, 1),
        ("[[50,50]]", BOXES, 2 / 4, 0, 0),
        ("[[50,50],[60,60],[70,70]]", BOXES, 2 / 6, 0, 1),  # three points in one box
        ("[[50,50],[250,50],[50,250],[1,1]]", BOXES, 6 / 7, 0, 0),
        ("[[150,150]]", BOXES, 0, 0, 0),
        ("None", BOXES, 0, 0, 0),
        ("hm", BOXES, 0, 0, 0),
        ("None", "None", 1, 1, 1),
        ("[[1,1]]", "None", 0, 0, 0),
        ("hm", "None", 0, 0, 0),
        ("[[118,100],[100,100]]", [[100, 100], [140, 100]], 1, 1, 1),  # within 25 pixels, 5 % of the diagonal
        ("[[126,100],[100,100]]", [[100, 100], [160, 100]], 2 / 4, 0, 1),
        ("[[100,126]]", [[100, 100]], 0, 0, 1),
        # Both points hit the box in the middle; the matching finds the other one for the first.
        ("[[95,50],[120,50]]", [[80, 0, 150, 100], [0, 0, 100, 100]], 1, 1, 1),
    ],
)
def test_rewards_by_hand(answer: str, true: Any, f1: float, everything: float, count: float) -> None:
    rewards = {"f1": 1.0, "all": 1.0, "count": 1.0}
    env = PointEnv(dataset=[{"image": PICTURE, "question": "?", "answer": true}], rewards=rewards)
    score = env.score(AnswerFormat.TAGS.write(answer), env.source.get(0))
    assert score.terms == pytest.approx({"f1": f1, "all": everything, "count": count})


def test_metrics_by_hand() -> None:
    env = PointEnv(dataset=[{"image": PICTURE, "question": "?", "answer": BOXES}])
    measured = env.measure(AnswerFormat.TAGS.write("[[50,50],[60,60]]"), env.target(env.source.get(0)), {})
    counts = [measured[name] for name in ("points/hits", "points/answered", "points/true", "f1/mean", "accuracy")]
    assert counts == [1, 2, 3, 0.4, 0]
    assert env.ratios == {"precision": ("points/hits", "points/answered"), "recall": ("points/hits", "points/true")}
    assert env.traits(((1.0, 2.0),), env.target(env.source.get(0))) == {"point_ratio": 1 / 3}


PLACES = st.tuples(st.integers(0, 20), st.integers(0, 20))
EDGES = st.tuples(*[st.integers(0, 20)] * 4).filter(lambda e: e[0] < e[2] and e[1] < e[3])


@settings(max_examples=60, deadline=None)
@given(st.lists(PLACES, max_size=4), st.lists(PLACES | EDGES, max_size=3))
def test_the_matching_is_the_best_of_all(points: list[Any], regions: list[Any]) -> None:
    """Against every assignment, with distances and containment by shapely."""

    def hit(point: Any, region: Any) -> bool:
        if len(region) == 2:
            return bool(shapely.distance(shapely.Point(point), shapely.Point(region)) <= 3)
        return bool(shapely.box(*region).covers(shapely.Point(point)))

    table = [[hit(point, region) for region in regions] + [False] * len(points) for point in points]
    slots = range(len(regions) + len(points))
    best = max(sum(map(list.__getitem__, table, chosen)) for chosen in itertools.permutations(slots, len(points)))
    target = Pointing(tuple(regions), (3.0, 3.0))
    assert count_hits(points, target) == best
    whole = len(points) + len(regions)
    assert point_f1_reward("", target, tuple(points)) == pytest.approx(2 * best / whole if whole else 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_masks_are_hit_where_their_pixels_are(height: int, width: int, random: Any) -> None:
    """Against the pixels, through both forms of pycocotools' run lengths."""
    pixels = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    pixels[0, 0] = True
    packed = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
    packed["counts"] = packed["counts"].decode()
    flat = pixels.T.ravel()
    runs = [len(list(run)) for _, run in itertools.groupby([False, *flat.tolist()])]
    runs[0] -= 1
    for rle in (packed, {"size": [height, width], "counts": runs}):
        (region,) = read_regions(json.dumps({"segmentation": rle}))
        assert shape_of(region).area == pixels.sum()
        centres = np.array([(x + 0.5, y + 0.5) for y in range(height) for x in range(width)])
        assert holds(region, centres, REACH).tolist() == pixels.ravel().tolist()
        assert holds(region, np.array([json.loads(write_inner_point(region))]), REACH).all()


@pytest.mark.parametrize(
    ("row", "question", "regions"),
    [
        (
            {
                "label": "dogs",
                "count": 2,
                "points": [{"x": 10.5, "y": 20}, {"x": 50, "y": 50}],
            },  # PixMo-Points, percent
            "Point at all of these: dogs.",
            ((42, 60), (200, 150)),
        ),
        ({"label": "dogs", "points": {"x": [50], "y": [10]}}, "Point at all of these: dogs.", ((200, 30),)),
        ({"label": "cows", "points": []}, "Point at all of these: cows.", ()),
        (
            {"problem": "Where?", "solution": '[{"bbox_2d": [1, 2, 30, 40], "point_2d": [15, 20]}]'},  # VisionReasoner
            "Where?",
            ((1, 2, 30, 40),),
        ),
        ({"problem": "Where?", "solution": '[{"point_2d": [15, 20]}]'}, "Where?", ((15, 20),)),
        (
            {"question": "Where?", "answer": [{"segmentation": [[0, 0, 10, 0, 0, 10]]}]},  # COCO
            "Where?",
            ((0, 0, 10, 0, 0, 10),),
        ),
        ({"question": "Where?", "answer": [5, 6]}, "Where?", ((5, 6),)),
    ],
)
@pytest.mark.parametrize("coordinates", ["original", "norm1000"])
def test_own_truths_score_1_in_each_layout(
    row: dict[str, Any], question: str, regions: tuple[Any, ...], coordinates: str
) -> None:
    env = PointEnv(dataset=[{"image": PICTURE, **row}], coordinates=coordinates)
    sample = env.source.get(0)
    assert (sample.question, sample.target) == (question, regions)
    assert env.score(env.write_answer(sample), sample).terms == {"f1": 1, "format": 1}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("there", "is neither JSON nor None"),
        ([1, 2, 3], r"is neither \[x, y\]"),
        ([{"label": "dog"}], "is no region: it has none of segmentation"),
        ([{"label": "dog", "bbox": None}], "is no region: its bbox is empty"),
        ([{"segmentation": {"size": [2, 2], "counts": [9]}}], "its counts do not add up to its size"),
        ([{"segmentation": {"size": [2, 2], "counts": [4]}}], "a mask is empty"),
        ([{"segmentation": {"size": [2], "counts": [4]}}], "a mask is not in COCO's run lengths"),
        ([[5, 5, 1, 1]], r"\[5, 5, 1, 1\] is neither"),
        ([[10**400, 5]], "is neither"),
        ([[float("nan"), 5]], "is neither"),
        ([{"segmentation": [[5, 5, 9, 9]]}], r"\[5, 5, 9, 9\] is no outline, which has three corners or more"),
        ([{"polygon": [[5, 5], [9, 9]]}], r"\[5, 5, 9, 9\] is no outline"),
    ],
)
def test_wrong_truths_are_told(answer: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"row 0: .*{told}"):
        PointEnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}])


def test_points_of_a_table_are_read(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text('image,label,points\na.png,cat,"[{""x"": 10, ""y"": 50}]"\n')
    place = (PICTURE.width / 10, PICTURE.height / 2)
    assert PointEnv(dataset=tmp_path / "rows.csv").source.get(0).target == (pytest.approx(place),)


@pytest.mark.parametrize("points", ["there", 5, [[1, 2, 3]], [{"x": 1}]])
def test_wrong_points_name_their_columns(points: Any) -> None:
    with pytest.raises(DataError, match="row 0: the columns 'label', 'points' do not hold what they should"):
        PointEnv(dataset=[{"image": PICTURE, "label": "cat", "points": points}])


def test_the_built_in_truths_are_the_pixels_of_the_shapes() -> None:
    env = PointEnv(split="eval")
    numbers = set()
    for index in range(20):
        sample = env.source.get(index)
        numbers.add(len(sample.target))
        for region in sample.target:
            ys, xs = np.nonzero(~np.isclose(sample.images[0], sample.images[0][0, 0]).all(axis=2))
            inside = holds(region, np.stack([xs, ys], axis=1) + 0.5, REACH)
            assert inside.sum() == shape_of(region).area  # no pixel of the background is within
    assert len(numbers) > 2


def test_a_mask_with_a_hole_keeps_it() -> None:
    ring = np.ones((5, 5), dtype=np.bool_)
    ring[2, 2] = False
    assert shape_of(outlines_of_mask(ring)).area == 24
    assert len(outlines_of_mask(ring)) == 2


@pytest.mark.slow
def test_thousands_of_points_take_no_time() -> None:
    target = Pointing(tuple((float(x), float(x), x + 9.0, x + 9.0) for x in range(100)), REACH)

    def score(count: int) -> float:
        points = parse_points(json.dumps([[i, i] for i in range(count)])[:20_000])
        return point_f1_reward("", target, points)

    assert growth(score, 200) < 24
