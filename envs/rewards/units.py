r"""Units of measurement: reads "cm^2", "km/h", "square metres", "平方厘米" and names of counted things, and converts.

A unit is a scale and powers of what it measures, so that N·m and J, or 1 h and 60 min, agree.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Final, NamedTuple


class Unit(NamedTuple):
    """A unit: how many of its base units it is, and the powers of these."""

    scale: Fraction
    powers: tuple[tuple[str, int], ...]
    """by name, in order, none of them 0; a thing that is counted is a base unit of its own, such as `"people"`"""
    is_doubtful: bool = False
    """whether it may also be a variable or a magnitude, as the s of "5s" and the K of "5K"; it is not left out then"""
    is_prime: bool = False
    """whether it is written as ′ or ″, which may also be of feet, inches, minutes or seconds"""


CURRENCIES: Final = "$€£¥₹"
"""The base units of money."""


def conversion(unit: Unit | None, other: Unit | None) -> Fraction | None:
    """The factor from `unit` to `other`; None if they measure different things.

    A unit may be left out on either side, if it is no doubtful one.
    """
    if unit is None or other is None:
        return None if (unit or other or _NONE).is_doubtful else Fraction(1)
    if unit.powers == other.powers:
        return unit.scale / other.scale
    if unit.is_prime or other.is_prime:
        return _conversion_of_primes(unit, other)
    mine, others = {name for name, _ in unit.powers}, {name for name, _ in other.powers}
    if mine <= _ANGLES and others <= _ANGLES and "°" in mine | others:
        return Fraction(1)  # 30° for 30 °C
    words = {name for name in mine if name.startswith(_COUNTED)}, {name for name in others if name.startswith(_COUNTED)}
    are_alike = bool(words[0] & words[1]) or _in_chinese(words[0]) != _in_chinese(words[1])
    return Fraction(1) if are_alike and all(words) and words == (mine, others) else None


def _in_chinese(words: set[str]) -> bool:
    """Whether things are named in Chinese, such as 人, which cannot be told from the English for other things."""
    return any(word.isalpha() and not word.isascii() for word in (name[1:] for name in words))


def _conversion_of_primes(unit: Unit, other: Unit) -> Fraction | None:
    """The factor where a prime may be a minute of time, or a foot, as what it is compared with is."""
    arc, fixed = (unit, other) if unit.is_prime else (other, unit)
    meaning = _MEANINGS_OF_PRIMES.get((arc.scale, fixed.powers))
    if meaning is None:
        return None
    return meaning / fixed.scale if arc is unit else fixed.scale / meaning


DEGREES: Final = (("°", 1),)
"""Powers of the base units of an angle in degrees."""
RADIANS: Final = (("rad", 1),)
_MEANINGS_OF_PRIMES: Final[dict[tuple[Fraction, tuple[tuple[str, int], ...]], Fraction]] = {
    (Fraction(1, 60), (("m", 1),)): Fraction(381, 1250),
    (Fraction(1, 3600), (("m", 1),)): Fraction(127, 5000),
    (Fraction(1, 60), (("s", 1),)): Fraction(60),
    (Fraction(1, 3600), (("s", 1),)): Fraction(1),
}
"""By the scale of ′ or ″ as a part of a degree, and what it is compared with."""
_COUNTED: Final = "#"
_NONE: Final = Unit(Fraction(1), ())
_ANGLES: Final = {"°", "°C", "°F"}

_PREFIXES: Final = {
    "p": (-12, "pico", "皮"), "n": (-9, "nano", "纳"), "μ": (-6, "micro", "微"), "u": (-6, "micro", "微"),
    "m": (-3, "milli", "毫"), "c": (-2, "centi", "厘"), "d": (-1, "deci", "分"), "h": (2, "hecto", "百"),
    "k": (3, "kilo", "千"), "M": (6, "mega", "兆"), "G": (9, "giga", "吉"), "T": (12, "tera", "太"),
}  # fmt: skip
# Symbol: prefixes that are used with it (pm and am are hours), names, value in base units.
_PREFIXED: Final[dict[str, tuple[str, str, str, str]]] = {
    "m": ("nμumcdk", "meter metre", "米", "m"),
    "g": ("μumk", "gram gramme", "克", "g"),
    "s": ("nμum", "second sec", "秒", "s"),
    "L": ("μumcd", "liter litre", "升", "1/1000 m3"),
    "l": ("mcd", "", "", "1/1000 m3"),
    "N": ("mkM", "newton", "牛 牛顿", "1000 g m s-2"),
    "J": ("mkMG", "joule", "焦 焦耳", "1000 g m2 s-2"),
    "W": ("mkMG", "watt", "瓦 瓦特", "1000 g m2 s-3"),
    "V": ("μumkM", "volt", "伏 伏特", "1000 g m2 s-3 A-1"),
    "A": ("nμumk", "ampere amp", "安 安培", "A"),
    "K": ("m", "kelvin", "开", "K"),
    "Pa": ("hkMG", "pascal", "帕 帕斯卡", "1000 g m-1 s-2"),
    "Hz": ("kMGT", "hertz", "赫 赫兹", "s-1"),
    "C": ("pnμum", "coulomb", "库 库仑", "A s"),
    "F": ("pnμum", "farad", "法", "1/1000 g-1 m-2 s4 A2"),
    "Ω": ("mkM", "ohm", "欧 欧姆", "1000 g m2 s-3 A-2"),
    "T": ("μumn", "tesla", "特", "1000 g s-2 A-1"),
    "H": ("mμu", "henry", "亨", "1000 g m2 s-2 A-2"),
    "Wb": ("m", "weber", "韦", "1000 g m2 s-2 A-1"),
    "eV": ("kMG", "electronvolt", "", "eV"),
    "Å": ("", "angstrom ångström", "埃", "1/10000000000 m"),
    "mol": ("mk", "mole", "摩尔", "mol"),
    "cal": ("k", "calorie", "卡", "cal"),
    "bar": ("m", "", "", "100000000 g m-1 s-2"),
    "lm": ("", "lumen", "", "lm"),
    "lx": ("", "lux", "", "lx"),
    "B": ("kMGT", "byte", "字节", "byte"),
}
_OTHERS: Final[dict[str, str]] = {  # value: names
    "60 s": "min mins minute minutes 分钟",
    "3600 s": "h hr hrs hour hours 小时 时",
    "86400 s": "day days 天 日",
    "604800 s": "week weeks wk 周",
    "month": "month months 个月 月",
    "year": "year years yr yrs 年 岁",
    "127/5000 m": "in inch inches",
    "381/1250 m": "ft foot feet 英尺",
    "1143/1250 m": "yd yard yards",
    "201168/125 m": "mi mile miles 英里",
    "45359237/100000 g": "lb lbs pound pounds",
    "45359237/1600000 g": "oz ounce ounces",
    "1000000 g": "t ton tons tonne tonnes 吨",
    "1000 g": "公斤",
    "1 g": "公克",
    "500 g": "斤",
    "1/100 m": "公分",
    "1000 m": "公里",
    "1 m": "公尺",
    "1/1000000 m3": "cc",
    "10000 m2": "ha hectare hectares 公顷",
    "acre": "acre acres",
    "gallon": "gal gallon gallons",
    "°": "° deg degs degree degrees 度",
    "1/60 °": "′ arcmin arcmins arcminute arcminutes 角分",
    "1/3600 °": "″ arcsec arcsecs arcsecond arcseconds 角秒",
    "rad": "rad rads radian radians 弧度",
    "°C": "°C celsius centigrade 摄氏度",
    "°F": "°F fahrenheit 华氏度",
    "201168/450000 m s-1": "mph",
    "5/18 m s-1": "kmh kph kmph",
    "s-1/60": "rpm",
    "3600000000 g m2 s-2": "kWh",
    "3600000 g m2 s-2": "Wh",
    "px": "px pixel pixels 像素",
    "1 $": "$ dollar dollars USD 美元",
    "1/100 $": "cent cents ¢",
    "€": "€ euro euros EUR 欧元",
    "£": "£ GBP 英镑",
    "¥": "¥ yuan RMB CNY yen JPY 元 块 人民币 日元",
    "1/10 ¥": "角",
    "₹": "₹ rupee rupees Rs INR",
    "times": "times 倍 次",
    "1": "unit units 单位",
}


def _parsed(text: str) -> Unit:
    scale, powers = Fraction(1), {}
    for part in text.split():
        if match := re.fullmatch(r"([^\d/-]+)(-?\d*)", part):
            powers[match[1]] = int(match[2] or 1)
        elif part == "s-1/60":
            scale, powers = Fraction(1, 60), {"s": -1}
        else:
            scale *= Fraction(part)
    return Unit(scale, tuple(sorted(powers.items())))


def _times(a: Unit, b: Unit, power: int) -> Unit:
    powers = dict(a.powers)
    for name, exponent in b.powers:
        powers[name] = powers.get(name, 0) + exponent * power
    return Unit(a.scale * b.scale**power, tuple(sorted((name, p) for name, p in powers.items() if p)))


def _table() -> dict[str, Unit]:
    table = {name: _parsed(value) for value, names in _OTHERS.items() for name in names.split()}
    for symbol, (prefixes, names, chinese, value) in _PREFIXED.items():
        unit = _parsed(value)
        words = [name + plural for name in names.split() for plural in ("", "s")]
        table |= dict.fromkeys([symbol, *words, *chinese.split()], unit)
        for prefix in prefixes:
            exponent, long, character = _PREFIXES[prefix]
            bigger = unit._replace(scale=unit.scale * Fraction(10) ** exponent)
            forms = [prefix + symbol, *(long + word for word in words), *(character + word for word in chinese.split())]
            table |= {form: bigger for form in forms if form not in table}
    for name in "′″":
        table[name] = table[name]._replace(is_prime=True)
    for name, square in (("sqm", "m"), ("sqft", "ft"), ("sqcm", "cm")):
        table[name] = _times(_NONE, table[square], 2)
    return table


_UNITS: Final = _table()
_FEET: Final = {"′": _UNITS["ft"], "″": _UNITS["in"]}
_FOLDED: Final = {name.casefold(): unit for name, unit in reversed(_UNITS.items()) if len(name) > 1}
_LONGEST: Final = 60
_POWERS: Final = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_LATER_POWERS: Final = {"squared": 2, "cubed": 3}
_TOKEN = re.compile(
    r"(?P<power>(?: ?(?:\^|\*\*) ?\{? ?|(?<=[A-Za-z]))(?P<number>[+-]?\d)(?!\d)(?: ?\})?)"
    r"| *(?:(?P<word>°[CF]?|[′″]|[A-Za-zμΩÅåö]+|[$€£¥₹¢]|[\u4e00-\u9fff]+)"
    r"|(?P<times>\\cdot(?![A-Za-z])|\\times(?![A-Za-z])|[·*.-])|(?P<over>/)|(?P<bracket>[()]))"
)
_THAT_CALCULATE: Final = (
    "and or not no nor plus minus divided over under less more fewer than greater at most least if when where for"
    " to from between by with without of is are was be equals equal then so but pi sqrt root sin cos tan cot csc log ln"
    " exp lim max mod hundred thousand million billion trillion dozen half third quarter percent factorial choose"
    " infinity either neither both only maybe possibly perhaps instead wrong incorrect false am pm"
)
_NO_WORD_OF_A_UNIT: Final = frozenset(_THAT_CALCULATE.split())


def is_unit(text: str) -> bool:
    """Whether a text is a unit of measurement, and no mere word."""
    return 0 < len(text) <= _LONGEST and _measured(plain_signs(text)) is not None


@functools.lru_cache(4096)
def read_unit(text: str) -> Unit | None:
    """A unit, such as "km/h", "m s^{-2}", "square feet", "平方米" or "5"'s "apples"; None if a text is none.

    Words that are no unit name counted things, unless one of them calculates or compares ("plus", "less than").
    """
    text = text.strip()
    if not text or len(text) > _LONGEST:
        return None
    return _measured(text) or _counted(text)


def _measured(text: str) -> Unit | None:
    """A unit of the table, or a product of them."""
    if text in _FEET:
        return _UNITS[text]
    unit, last, sign, following, end, is_named = _NONE, None, 1, 1, 0, False
    while end < len(text):
        token = _TOKEN.match(text, end)
        if token is None:
            return None
        end = token.end()
        word = token["word"]
        if token["power"] or word in _LATER_POWERS:
            if last is None:
                return None
            power = int(token["number"]) if token["power"] else _LATER_POWERS[word]
            unit, last = _times(_times(unit, last, -sign), last, sign * power), None
        elif token["over"] or word in ("per", "each", "每"):
            sign = -1
        elif word in ("an", "a") and last is not None:
            sign = -1  # miles an hour
        elif word in _POWERS:
            following = _POWERS[word]
        elif word:
            factor = _factor(word)
            if factor is None:
                return None
            last, following, is_named = _times(_NONE, factor, following), 1, True
            unit = _times(unit, last, sign)
    return unit if is_named else None


def _factor(word: str) -> Unit | None:
    """A unit of one word, Chinese squares and quotients among them."""
    for name, power in (("平方", 2), ("立方", 3), ("二次方", 2), ("三次方", 3)):
        if word.startswith(name):
            factor = _factor(word[len(name) :])
            return _times(_NONE, factor, power) if factor else None
    if "每" in word:
        over, under = map(_factor, word.split("每", 1))
        return _times(over, under, -1) if over and under else None
    return _UNITS.get(word) or (_FOLDED.get(word.casefold()) if len(word) > 1 else None)


_WORDS = re.compile(r"[A-Za-z][A-Za-z'-]{2,}(?:,? \(?[A-Za-z][A-Za-z'-]*\)?)*|[\u4e00-\u9fff]{1,6}")
_REMARK = re.compile(r"^\(([A-Za-z][A-Za-z -]+)\)$")
_CHINESE_NO: Final = re.compile(r"[或和与加减乘除不非没以上下多少倍万亿千百十分之]")


def _counted(text: str) -> Unit | None:
    text = _REMARK.sub(r"\1", text)
    if not _WORDS.fullmatch(text) or _CHINESE_NO.search(text):
        return None
    words = [word.strip("(),").casefold() for word in text.split()]
    if not _NO_WORD_OF_A_UNIT.isdisjoint(words) or not (re.search("[aeiouy\u4e00-\u9fff]", words[0])):
        return None
    if set(words[0]) <= set("abcxyz") or "times" in words[:-1] or any(len(word) == 1 for word in words[1:]):
        return None
    return Unit(Fraction(1), tuple((name, 1) for name in sorted({_COUNTED + word.removesuffix("s") for word in words})))


_SYMBOLS_THAT_MAY_BE_OTHERS: Final = frozenset("shtldKBT")
"""Variables, or thousands, billions and trillions."""
_HOW = re.compile(
    r" (?:of (?:them|these|those|the [a-z]+)|old|tall|long|wide|deep|high|thick|heavy|each|apart|away|altogether"
    r"|in (?:total|all|length|area|height|width|volume))$"
)
_BEFORE = re.compile(r"(?<=[\d)}\]%πA-Za-z])(?=[ A-Za-zμΩÅ°′″$€£¥₹¢\u4e00-\u9fff'\"])|(?<=[\d)}\]]) ?(?=/ ?[A-Za-z])")
_HAS_NUMBER = re.compile(r"\d|\\pi|π|\\frac|\\sqrt|\\infty")
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|(?<=\d)[A-Za-z](?![A-Za-z])")
_CURRENCY = re.compile(
    r"([+-]?) ?(?:\\?\$|US\$|[€£¥₹]|(?:USD|EUR|GBP|CNY|RMB|JPY|INR|Rs)\.?(?= ?\d))(?: |\\ )*(?=[\d.+-])"
)
__ARC = re.compile(
    r" ?\^ ?(?:\{ ?(?:\\circ|\\degree|∘|°) ?\}|\\circ(?![A-Za-z])|∘|°)"
    r"|(?<=\d) ?\^ ?(?:o(?!\w)|\{ ?o ?\})|\\(?:degree|textdegree)(?![A-Za-z])|∘"
)


_MICRO = re.compile(r"(?:\\mu(?![A-Za-z])|μ) *(?=[A-Za-zΩ])")


def plain_signs(text: str) -> str:
    r"""A text with degrees as `°`, and with Ω and μ as such before other letters."""
    text = _OVER.sub(_as_quotient, __ARC.sub("°", text)) if "frac" in text else __ARC.sub("°", text)
    text = text.replace("\\Omega", "Ω").replace("\\ohm", "Ω")
    return " ".join(_MICRO.sub("μ", text).split())


_OVER = re.compile(r"(?<=[\d}]) *\\[dt]?frac ?\{ ?([^{}\d]+?) ?\} ?\{ ?([^{}\d]+(?: ?\^ ?(?:\d|\{ ?\d ?\}))?) ?\}")


def _as_quotient(match: re.Match[str]) -> str:
    r"""`5 \frac{m}{s}` as `5 m/s`; a fraction that is none of units stays."""
    over, under = (part.strip() for part in match.groups())
    return f" {over}/({under})" if _measured(over) and _measured(under) else match[0]


_PART: Final = r"(\d+(?:\.\d+)?) ?([A-Za-z°]+|[′″]|[\u4e00-\u9fff]+?)"
_AND: Final = r"(?:,? (?:and )?|和|又)?"
_PARTS = re.compile(rf"(.*= ?)?(-?){_PART}{_AND}{_PART}(?:{_AND}{_PART})?")
_SMALLER: Final[dict[tuple[tuple[str, int], ...], dict[str, Unit]]] = {
    powers: {name: _parsed(value) for value, names in units.items() for name in names.split()}
    for powers, units in (
        (DEGREES, {"1/60 °": "′ 分 min minute minutes", "1/3600 °": "″ 秒 s sec second seconds"}),
        ((("s", 1),), {"60 s": "分 ′", "1 s": "秒 ″"}),
        ((("¥", 1),), {"1/100 ¥": "分"}),
    )
}
"""What words and signs mean after a unit of these powers."""


def joined_units(text: str) -> str:
    """A quantity in several units of one kind, each less than one of the unit before, in its first: "2 h 30 min"."""
    match = _PARTS.fullmatch(text)
    if match is None:
        return text
    parts = [(Fraction(match[i]), match[i + 1]) for i in (3, 5, 7) if match[i]]
    first = _measured(parts[0][1])
    if first is None and parts[0][1] == "分" and parts[1][1] == "秒":
        parts[0], first = (parts[0][0], "min"), _UNITS["min"]
    if first is None:
        return text
    is_feet = [name for _, name in parts] == ["′", "″"] and parts[1][0] < 12
    names = _FEET if is_feet else _SMALLER.get(first.powers, {})
    first = _FEET["′"] if is_feet else first
    total, before = parts[0][0] * first.scale, first.scale
    for number, name in parts[1:]:
        unit = names.get(name) or _measured(name)
        if unit is None or unit.powers != first.powers or number * unit.scale >= before:
            return text
        total, before = total + number * unit.scale, unit.scale
    return f"{match[1] or ''}{match[2]}{total / first.scale} {'ft' if is_feet else parts[0][1]}"


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""The quantity and its unit: ("5", cm) of "5 cm"; None if there is no unit.

    Args:
        text: As `plain_signs` writes it.
    """
    if currency := _CURRENCY.match(text):
        sign = currency[0].strip().lstrip("+- ").strip("\\ .").removeprefix("US$" if "$" in currency[0] else "")
        sign = "$" if "$" in currency[0] else sign
        body, unit = split_unit(currency[1] + text[currency.end() :])
        return body, _times(_UNITS[sign], unit, 1) if unit and unit.powers[0][0] != sign else _UNITS[sign]
    for place in _BEFORE.finditer(text):
        body, rest = text[: place.start()], text[place.end() :]
        if not _HAS_NUMBER.search(body) or len(rest) > _LONGEST:
            continue
        unit = _unit_after(body, rest)
        if unit is not None:
            return body.rstrip(), unit if unit.powers else None
    return text, None


def _unit_after(body: str, rest: str) -> Unit | None:
    name = _HOW.sub("", f" {rest.strip()}").strip()
    if not name and rest.strip():
        return _NONE
    unit = _measured(name) if len(name) <= _LONGEST else None
    is_spaced = not rest[:1].isascii() or rest.startswith(" ") or re.search(r"(?:[^A-Za-z]|\\pi)$", body)
    if unit is not None and is_spaced:
        letter = re.match(r"[A-Za-z](?![A-Za-z])", name)
        if letter and _VARIABLE.search(body):
            return None  # 2x m
        is_doubtful = letter is not None and letter[0] in _SYMBOLS_THAT_MAY_BE_OTHERS and not rest.startswith(" ")
        return unit._replace(is_doubtful=is_doubtful and len(name) == 1)
    if not (rest.startswith(" ") or name[:1] >= "\u4e00") or not re.search(r"[\d}]$", body) or _VARIABLE.search(body):
        return None
    return read_unit(name)
