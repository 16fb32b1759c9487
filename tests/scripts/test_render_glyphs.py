"""scripts/render_glyphs.py without Debian's fonts: its character sets, and rendering with the fonts of matplotlib."""

from pathlib import Path

import numpy as np
import pytest

from fastret.data import load_glyphs

pytest.importorskip("PIL")
pytest.importorskip("fontTools")
matplotlib = pytest.importorskip("matplotlib")
script = pytest.importorskip("render_glyphs")

FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf")
BLANK, UNDRAWN = ord(" "), 0x4E00  # DejaVu has no Chinese characters: it draws its .notdef box


def _fonts() -> list[Path]:
    return [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name for name in FONTS]


def _set(train: str, held_out: str, classes: int | None = None) -> object:
    fonts = tuple(script.Font("matplotlib", name, 0, name, "", "") for name in FONTS)
    return script.GlyphSet([*map(ord, train)], [*map(ord, held_out)], fonts, classes)


def test_gb2312_level_1_is_complete() -> None:
    characters = script.gb2312_level_1()
    assert len(set(characters)) == len(characters) == 3755
    assert chr(characters[0]) == "啊"


def test_halves_are_disjoint_complete_and_always_the_same() -> None:
    first, second = script.halves(range(101))
    assert sorted(first + second) == list(range(101))
    assert abs(len(first) - len(second)) == 1
    assert script.halves(range(101)) == (first, second)


def test_shipped_characters_are_those_of_the_recipe() -> None:
    shipped = load_glyphs()
    demo = script.SETS["demo"]
    names = [ord(name) for name in shipped.class_names]
    assert set(names[: shipped.train_classes]) <= set(demo.train)
    assert set(names[shipped.train_classes :]) <= set(demo.held_out)
    assert shipped.train_classes == demo.classes


def test_every_definition_has_its_own_fingerprint() -> None:
    sets = [_set("AB", "C"), _set("A", "BC"), _set("AB", "C", 1), *script.SETS.values()]
    assert len({each.fingerprint() for each in sets}) == len(sets)
    assert _set("AB", "C").fingerprint() == sets[0].fingerprint()


def test_characters_that_a_font_does_not_draw_are_left_out() -> None:
    glyph_set = _set(f"A{chr(BLANK)}B{chr(UNDRAWN)}", "CDE")
    mapped = {BLANK, UNDRAWN, *map(ord, "ABCE")}
    images, code_points, train = script.render(glyph_set, _fonts(), mapped)
    assert [chr(c) for c in code_points] == ["A", "B", "C", "E"]
    assert train == 2
    assert images.shape == (4, 2, script.BOX, script.BOX)
    assert images.dtype == np.uint8
    assert images.any(axis=(2, 3)).all()
    assert (images[:, 0] != images[:, 1]).any(axis=(1, 2)).all()


def test_so_many_classes_of_each_part_are_kept() -> None:
    _, code_points, train = script.render(_set("ABC", "DEF", 2), _fonts(), set(map(ord, "ABCDEF")))
    assert ([chr(c) for c in code_points], train) == (["A", "B", "D", "E"], 2)


def test_glyphs_stand_in_the_middle() -> None:
    images, _, _ = script.render(_set("HO", "I"), _fonts(), set(map(ord, "HOI")))
    for image in images.reshape(-1, script.BOX, script.BOX):
        for axis in (0, 1):
            inked = np.flatnonzero(image.any(axis=axis))
            assert abs(inked[0] - (script.BOX - 1 - inked[-1])) <= 1


def test_a_missing_font_is_named(tmp_path: Path) -> None:
    font = script.SETS["demo"].fonts[0]
    with pytest.raises(SystemExit, match=r"Noto Serif CJK SC of fonts-noto-cjk is not at .* or "):
        script.locate(font, tmp_path, tmp_path)
    (tmp_path / font.file).parent.mkdir(parents=True)
    (tmp_path / font.file).touch()
    assert script.locate(font, tmp_path, tmp_path) == tmp_path / font.file
