"""Render a glyph retrieval set (class = character, image = font) from Debian's font packages.

    python scripts/render_glyphs.py s                     # into the cache folder
    python scripts/render_glyphs.py demo --output fastret/data/glyphs_demo.npz

The packages are downloaded with `apt-get download` and unpacked with `dpkg -x` into the cache folder: no root
is needed and nothing is installed. Elsewhere, unpack them yourself and pass --font-dir. Needs the extra
fastret[data] (Pillow, fontTools).

A class is a code point that every font of the set maps, and that none of them draws blank or like its .notdef
box (some fonts claim characters that they do not draw). The result depends on the fonts, on the FreeType in
Pillow and on zlib alone. Its SHA-256 is printed and recorded; a file that still has it is not rendered again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastret.data.glyphs import cache_folder, rendered_file, write_glyphs

try:
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'fastret[data]'") from error

BOX = 32
EM = 28

# A noncharacter: fonts do not map it, so drawing it draws .notdef.
UNMAPPED = 0xFFFF


@dataclass(frozen=True)
class Font:
    """One face of a Debian package: `file` is relative to the package's root, `index` is for a .ttc."""

    package: str
    file: str
    index: int
    name: str
    licence: str
    style: str


@dataclass(frozen=True)
class GlyphSet:
    """Characters to train on, characters to hold out, and the fonts that draw them, in this order.

    `classes` keeps so many usable characters of each part, the first ones; None keeps all.
    """

    train: Sequence[int]
    held_out: Sequence[int]
    fonts: tuple[Font, ...]
    classes: int | None = None

    def fingerprint(self) -> str:
        """Differs for every other definition, so that a file of an older one is not taken for this one."""
        definition = json.dumps([asdict(self), BOX, EM], default=list)
        return hashlib.sha256(definition.encode()).hexdigest()[:16]


def gb2312_level_1() -> list[int]:
    """The 3,755 most common simplified characters: rows 16-55 of GB 2312-80."""
    cells = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    return [ord(character) for c in cells if (character := c.decode("gb2312", errors="ignore"))]


def halves(code_points: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two random halves that look alike, the same on every machine."""
    # RandomState rather than default_rng: NumPy freezes the stream of the former only.
    order = np.random.RandomState(0).permutation(len(code_points)).tolist()
    shuffled = [code_points[i] for i in order]
    middle = len(shuffled) // 2
    return shuffled[:middle], shuffled[middle:]


# Unicode 1.1's CJK Unified Ideographs ("URO"): what older fonts mean by "all characters".
URO = range(0x4E00, 0x9FA6)

# Unicode 3.0's Extension A: rare characters, built from the same parts.
EXTENSION_A = range(0x3400, 0x4DB6)

TRUETYPE = "usr/share/fonts/truetype"

SETS = {
    # OFL and Apache fonts only, because its images ship with fastret.
    "demo": GlyphSet(
        *halves(gb2312_level_1()),
        fonts=(
            Font(
                package="fonts-noto-cjk",
                file="usr/share/fonts/opentype/noto/NotoSerifCJK-Regular.ttc",
                index=2,
                name="Noto Serif CJK SC",
                licence="OFL-1.1",
                style="song (serif)",
            ),
            Font(
                package="fonts-lxgw-wenkai",
                file=f"{TRUETYPE}/lxgw-wenkai/LXGWWenKai-Light.ttf",
                index=0,
                name="LXGW WenKai Light",
                licence="OFL-1.1",
                style="kai (regular script), thin",
            ),
            Font(
                package="fonts-smiley-sans",
                file=f"{TRUETYPE}/smiley-sans/SmileySans-Oblique.ttf",
                index=0,
                name="Smiley Sans Oblique",
                licence="OFL-1.1",
                style="sans, condensed, oblique",
            ),
            Font(
                package="fonts-droid-fallback",
                file=f"{TRUETYPE}/droid/DroidSansFallbackFull.ttf",
                index=0,
                name="Droid Sans Fallback",
                licence="Apache-2.0",
                style="sans",
            ),
        ),
        classes=500,
    ),
    "s": GlyphSet(
        *halves(URO),
        fonts=(
            Font(
                package="fonts-wqy-zenhei",
                file=f"{TRUETYPE}/wqy/wqy-zenhei.ttc",
                index=0,
                name="WenQuanYi Zen Hei",
                licence="GPL-2 with font embedding exception",
                style="sans",
            ),
            Font(
                package="fonts-wqy-microhei",
                file=f"{TRUETYPE}/wqy/wqy-microhei.ttc",
                index=0,
                name="WenQuanYi Micro Hei",
                licence="Apache-2.0, or GPL-3+ with font exception",
                style="sans",
            ),
            Font(
                package="fonts-arphic-uming",
                file=f"{TRUETYPE}/arphic/uming.ttc",
                index=0,
                name="AR PL UMing CN",
                licence="Arphic Public License",
                style="ming (serif), thin",
            ),
            Font(
                package="fonts-arphic-ukai",
                file=f"{TRUETYPE}/arphic/ukai.ttc",
                index=0,
                name="AR PL UKai CN",
                licence="Arphic Public License",
                style="kai (regular script), thin",
            ),
        ),
    ),
    "l": GlyphSet(
        URO,
        EXTENSION_A,
        fonts=(
            Font(
                package="fonts-noto-cjk",
                file="usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
                index=2,
                name="Noto Sans CJK SC",
                licence="OFL-1.1",
                style="sans",
            ),
            Font(
                package="fonts-noto-cjk",
                file="usr/share/fonts/opentype/noto/NotoSerifCJK-Bold.ttc",
                index=2,
                name="Noto Serif CJK SC Bold",
                licence="OFL-1.1",
                style="song (serif), bold",
            ),
            Font(
                package="fonts-wqy-zenhei",
                file=f"{TRUETYPE}/wqy/wqy-zenhei.ttc",
                index=0,
                name="WenQuanYi Zen Hei",
                licence="GPL-2 with font embedding exception",
                style="sans",
            ),
            Font(
                package="fonts-cns11643-kai",
                file=f"{TRUETYPE}/cns11643/TW-Kai-98_1.ttf",
                index=0,
                name="TW-Kai",
                licence="OGDL-TW-1.0",
                style="kai (regular script)",
            ),
            Font(
                package="fonts-cns11643-sung",
                file=f"{TRUETYPE}/cns11643/TW-Sung-98_1.ttf",
                index=0,
                name="TW-Sung",
                licence="OGDL-TW-1.0",
                style="sung (serif)",
            ),
            Font(
                package="fonts-hanazono",
                file=f"{TRUETYPE}/hanazono/HanaMinA.ttf",
                index=0,
                name="HanaMinA Regular",
                licence="Hanazono Font License or OFL-1.1",
                style="mincho (serif)",
            ),
        ),
    ),
}


def download(package: str, cache: Path) -> Path:
    """The folder into which a Debian package is unpacked, after downloading it if need be."""
    tree = cache / package
    if tree.is_dir():
        return tree
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise SystemExit(
            f"apt-get and dpkg are not on this machine: unpack Debian's {package} to DIR/{package} elsewhere "
            "and pass --font-dir DIR"
        )
    cache.mkdir(parents=True, exist_ok=True)
    # Unpacked beside its place, then renamed: an interrupted download leaves no half-filled folder behind.
    with tempfile.TemporaryDirectory(dir=cache) as work:
        fetched = subprocess.run(["apt-get", "download", package], cwd=work, capture_output=True, text=True)
        archive = next(Path(work).glob("*.deb"), None)
        if fetched.returncode or archive is None:
            raise SystemExit(
                f"apt-get download {package} failed; run `apt-get update` first (as root), or check that "
                f"this release has the package:\n{fetched.stderr.strip()}"
            )
        subprocess.run(["dpkg", "-x", archive, f"{work}/tree"], check=True)
        os.replace(f"{work}/tree", tree)
    return tree


def locate(font: Font, font_dir: Path | None, cache: Path) -> Path:
    """The font's file: below DIR/<package> or DIR itself with --font-dir, else in the downloaded package."""
    roots = [download(font.package, cache)] if font_dir is None else [font_dir / font.package, font_dir]
    for root in roots:
        if (root / font.file).is_file():
            return root / font.file
    tried = " or ".join(str(root / font.file) for root in roots)
    raise SystemExit(f"{font.name} of {font.package} is not at {tried}")


def open_tables(font: Font, path: Path) -> TTFont:
    """The font's tables, checked to be of the face that the set names."""
    tables = TTFont(path, fontNumber=font.index, lazy=True)
    found = tables["name"].getDebugName(4)
    if found != font.name:
        raise SystemExit(f"face {font.index} of {path} is {found}, expected {font.name}")
    return tables


def draw(path: Path, index: int, code_points: Sequence[int], progress: tqdm[Any]) -> np.ndarray:
    """Each character white on black, its ink centred: (len(code_points), BOX, BOX) uint8."""
    # Basic layout: Raqm, which Pillow has on some machines only, could shape differently.
    face = ImageFont.truetype(path, EM, index=index, layout_engine=ImageFont.Layout.BASIC)
    images = np.empty((len(code_points), BOX, BOX), dtype=np.uint8)
    for row, code_point in enumerate(code_points):
        left, top, right, bottom = face.getbbox(chr(code_point))
        canvas = Image.new("L", (BOX, BOX))
        corner = ((BOX - (right - left)) // 2 - left, (BOX - (bottom - top)) // 2 - top)
        ImageDraw.Draw(canvas).text(corner, chr(code_point), fill=255, font=face)
        images[row] = np.asarray(canvas)
        progress.update()
    return images


def render(glyph_set: GlyphSet, paths: list[Path], mapped: set[int]) -> tuple[np.ndarray, list[int], int]:
    """Draw the set's characters, as far as all fonts map them.

    Returns:
        images (classes, fonts, BOX, BOX) uint8, one code point a class, and how many of the classes, counted
        from the first, are for training.
    """
    parts = [[c for c in part if c in mapped] for part in (glyph_set.train, glyph_set.held_out)]
    code_points = [c for part in parts for c in part]
    images = np.empty((len(code_points), len(paths), BOX, BOX), dtype=np.uint8)
    usable = np.ones(len(code_points), dtype=bool)
    with tqdm(total=len(paths) * (len(code_points) + 1), desc="drawing", unit="glyph") as progress:
        for column, (font, path) in enumerate(zip(glyph_set.fonts, paths, strict=True)):
            *drawn, notdef = draw(path, font.index, [*code_points, UNMAPPED], progress)
            images[:, column] = drawn
            usable &= images[:, column].any(axis=(1, 2)) & (images[:, column] != notdef).any(axis=(1, 2))
    rows = np.flatnonzero(usable)
    train = rows[rows < len(parts[0])][: glyph_set.classes]
    held_out = rows[rows >= len(parts[0])][: glyph_set.classes]
    kept = np.concatenate([train, held_out])
    return images[kept], [code_points[i] for i in kept], len(train)


def main() -> None:
    """Render one set, unless its output is there already."""
    parser = argparse.ArgumentParser(description="Render a glyph retrieval set from Debian's font packages.")
    parser.add_argument("set", choices=SETS, help="demo: the shipped one; s: 18,344 classes x 4 fonts; l: 27,484 x 6")
    parser.add_argument("--output", type=Path, help="the .npz to write (default: CACHE/glyphs_SET.npz)")
    parser.add_argument("--font-dir", type=Path, help="unpacked packages, each in a folder or all in one tree")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of packages and results")
    arguments = parser.parse_args()

    glyph_set = SETS[arguments.set]
    output = arguments.output or rendered_file(arguments.set, arguments.cache)
    if output.suffix != ".npz":
        parser.error(f"--output must end in .npz, got {output}")
    record = arguments.cache / f"glyphs_{arguments.set}.{glyph_set.fingerprint()}.sha256"
    if output.is_file() and record.is_file():
        digest = hashlib.sha256(output.read_bytes()).hexdigest()
        if digest == record.read_text().strip():
            print(f"{digest}  {output} (already rendered)")
            return

    paths = [
        locate(font, arguments.font_dir, arguments.cache / "fonts")
        for font in tqdm(glyph_set.fonts, desc="fetching", unit="font")
    ]
    tables = [open_tables(font, path) for font, path in zip(glyph_set.fonts, paths, strict=True)]
    mapped = set.intersection(*(set(table.getBestCmap()) for table in tables))
    fonts = [
        {**asdict(font), "version": table["name"].getDebugName(5)}
        for font, table in zip(glyph_set.fonts, tables, strict=True)
    ]
    images, code_points, train_classes = render(glyph_set, paths, mapped)
    recipe = json.dumps({"set": arguments.set, "box": BOX, "em": EM, "fonts": fonts})
    digest = write_glyphs(output, images, code_points, train_classes=train_classes, recipe=recipe)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"{digest}\n")
    print(f"{len(code_points):,} classes x {len(fonts)} fonts, {train_classes:,} classes for training")
    print(f"{digest}  {output}")


if __name__ == "__main__":
    main()
