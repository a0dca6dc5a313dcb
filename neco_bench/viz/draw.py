"""Drawing: segmentations, matches, neighbours and grids of pictures."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from neco_bench.core.task import Neighbour
from neco_bench.data.base import IGNORE, BoxDataset, PairDataset, SegmentationDataset
from neco_bench.features.patches import majority_label, patchify
from neco_bench.features.transforms import resize_nearest_pil

BOX, WIDE_BOX = (240, 180), (500, 180)  # pixels of thumbnails

SMALL, LARGE = 480, 1024  # minimum and maximum pixels of the longer side of a picture

GAP, LINE = 6, 20

# Blue and vermilion can also be distinguished by people with red-green colour blindness; errors also have broken lines
# or a cross.
RIGHT, WRONG, WHITE = (0, 114, 178), (214, 60, 0), (255, 255, 255)

# Pixels that are not scored are hatched, so that they are visible on white, on black and next to any class colour.
VOID, HATCH = WHITE, (90, 90, 90)

NOT_SCORED = "void: not scored"  # the name of hatched areas in legends

# The background of pictures with text is transparent in the files. TEXT is readable on white and on black.
PAPER, TEXT, BETWEEN = (254, 255, 254), (118, 118, 118), (128, 128, 128)

NEIGHBOURS, VIEW, PARTS = 5, 64, 8  # neighbours of a patch, pixels of each, and samples per side to classify a patch


@dataclass(frozen=True)
class Tile:
    """One picture (H, W, 3) uint8, or frames (T, H, W, 3) of an animation.

    kind: "photo" (stored as JPEG), "map" (enlarged without smoothing), "wide" or "animation".
    """

    title: str
    pixels: np.ndarray
    kind: str


@dataclass(frozen=True)
class PictureRow:
    """The pictures of one image or pair."""

    name: str
    caption: str
    tiles: list[Tile]


def hatched(colours: np.ndarray, void: np.ndarray) -> np.ndarray:
    """Hatch a picture (H, W, 3) at the pixels of `void` (H, W)."""
    y, x = np.indices(void.shape)
    lines = np.where(((x + y) % 8 < 2)[..., None], HATCH, VOID)
    return np.where(void[..., None], lines, colours).astype(np.uint8)


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Return the image (H, W, 3) in pale grey, with errors in vermilion and void hatched, (H, W, 3) uint8."""
    grey = (image.mean(2, keepdims=True) * 0.6 + 90).astype(np.uint8).repeat(3, axis=2)
    wrong, void = prediction != truth, truth == IGNORE
    grey[wrong] = (0.25 * grey[wrong] + 0.75 * np.array(WRONG)).astype(np.uint8)
    return hatched(grey, void)


def distinct_colours(count: int) -> np.ndarray:
    """Return colours (count, 3) uint8 with hues a golden angle apart, in three lightnesses."""
    hues = [(0.618034 * i) % 1 for i in range(count)]
    rows = [colorsys.hls_to_rgb(hue, (0.45, 0.65, 0.3)[i % 3], 0.7) for i, hue in enumerate(hues)]
    return (np.array(rows) * 255).round().astype(np.uint8)


def query_patches(truth: np.ndarray, prediction: np.ndarray, rows: int, columns: int) -> list[int]:
    """Return two patches (row-major indices) of an image: the one with most errors, and the one with fewest.

    Only patches that are at least half labelled are used; ties go to the patch nearest to the centre. Fewer are
    returned if there are none.
    """
    small = [
        patchify(resize_nearest_pil(m.astype(np.uint8), rows * PARTS, columns * PARTS), PARTS).numpy()
        for m in (truth, prediction)
    ]
    labelled = (small[0] != IGNORE).sum(1)
    share = ((small[0] != small[1]) & (small[0] != IGNORE)).sum(1) / np.maximum(labelled, 1)
    y, x = np.divmod(np.arange(rows * columns), columns)
    distance = np.hypot(y - (rows - 1) / 2, x - (columns - 1) / 2)
    usable = np.flatnonzero(labelled * 2 >= PARTS**2)
    if not len(usable):
        return []
    wrong = min(usable, key=lambda i: (-share[i], distance[i]))
    right = min(usable, key=lambda i: (share[i], distance[i]))
    return [int(i) for i in dict.fromkeys([wrong, right]) if i == right or share[i] > 0]


def class_colours(dataset: SegmentationDataset, ids: np.ndarray) -> np.ndarray:
    """Return the data set's colours (H, W, 3) of class ids (H, W), with void hatched."""
    palette = np.full((256, 3), 128, np.uint8)
    palette[: len(dataset.classes)] = dataset.palette
    return hatched(palette[ids], ids == IGNORE)


def class_legend(dataset: SegmentationDataset, maps: Sequence[np.ndarray]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the legend for the classes in some maps of class ids, including void if there is any."""
    present = sorted({int(own) for ids in maps for own in np.unique(ids)})
    legend = [(dataset.classes[c], tuple(dataset.palette[c].tolist())) for c in present if c < len(dataset.classes)]
    return [*legend, *([(NOT_SCORED, VOID)] if IGNORE in present else [])]


def draw_segmentation(dataset: SegmentationDataset, name: str, predicted: dict[str, Any], caption: str) -> PictureRow:
    """Draw an image, its ground truth, its prediction and the errors, side by side."""
    image = predicted["image"] if "image" in predicted else dataset[dataset.ids.index(name)].image
    side = min(max(SMALL, *image.shape[:2]), LARGE)
    image = fitted(image, (side, side), Image.Resampling.BICUBIC)
    height, width = image.shape[:2]
    truth, prediction = (enlarged(predicted[kind], height, width) for kind in ("truth", "prediction"))
    tiles = [
        Tile("image", image, "photo"),
        Tile("ground truth", class_colours(dataset, truth), "map"),
        Tile("prediction", class_colours(dataset, prediction), "map"),
        Tile("errors", error_map(image, truth, prediction), "map"),
    ]
    if "colours" in predicted:
        tiles.append(Tile("features (PCA)", enlarged(predicted["colours"], height, width), "map"))
    if "clusters" in predicted:
        clusters = predicted["clusters"]
        coloured = distinct_colours(int(clusters.max()) + 1)[clusters]
        tiles.append(Tile("clusters", enlarged(coloured, height, width), "map"))
    if "foreground" in predicted:
        tiles.append(_grey("foreground", predicted["foreground"] * 255, height, width))
    if "neighbours" in predicted:
        rows, columns = predicted["features"].shape[1:]
        queries = query_patches(predicted["truth"], predicted["prediction"], rows, columns)
        tiles[0] = Tile("image", _outlined(image, queries, rows, columns), "photo")
        strips = [_strip(image, predicted, patch, rows, columns, dataset.classes) for patch in queries]
        if strips:
            tiles.append(Tile("nearest patches in memory", np.concatenate(strips), "wide"))
    return PictureRow(name, caption, tiles)


def _strip(
    image: np.ndarray, predicted: dict[str, Any], patch: int, rows: int, columns: int, classes: Sequence[str]
) -> np.ndarray:
    """Draw a patch and its nearest neighbours with their surroundings; frames show whether the class is correct."""
    height, width = image.shape[0] / rows, image.shape[1] / columns
    row, column = divmod(patch, columns)
    canvas = np.pad(image, ((round(height),) * 2, (round(width),) * 2, (0, 0)))
    top, left = round(row * height), round(column * width)
    around = canvas[top : top + round(3 * height), left : left + round(3 * width)]
    small = resize_nearest_pil(predicted["truth"].astype(np.uint8), rows * PARTS, columns * PARTS)
    label = int(majority_label(patchify(small, PARTS)[patch][None], len(classes), "never votes")[0])
    neighbours: list[Neighbour] = predicted["neighbours"](patch)[:NEIGHBOURS]
    views = [(around, classes[label], (90, 90, 90))]
    views += [(n.view, f"{n.cosine:.2f}: {classes[n.label]}", RIGHT if n.label == label else WRONG) for n in neighbours]
    lines = [broken_lines(text, VIEW + 10, 11) for _, text, _ in views]
    step = VIEW + 18
    strip = Image.new("RGB", (len(views) * step, VIEW + 12 + 12 * max(map(len, lines))), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.fontmode = "1"  # without antialiasing, which would be visible on a dark page
    for i, (view, _, colour) in enumerate(views):
        draw.rectangle((i * step, 0, i * step + VIEW + 5, VIEW + 5), fill=colour)
        strip.paste(Image.fromarray(view).resize((VIEW, VIEW), Image.Resampling.BICUBIC), (i * step + 3, 3))
        third = VIEW / 3
        inner = (i * step + 3 + third, 3 + third, i * step + 3 + 2 * third, 3 + 2 * third)
        draw.rectangle(inner, outline=WHITE)
        if colour == WRONG:
            _cross(draw, i * step + VIEW - 5, 10)
        draw.text((i * step, VIEW + 7), "\n".join(lines[i]), fill=TEXT, font=font(11), spacing=1)
    return np.asarray(strip)


def broken_lines(text: str, width: int, size: int) -> list[str]:
    """Break a text into lines of at most `width` pixels in a font size, at spaces if possible."""
    lines, own = [""], font(size)
    for word in text.replace(" ", " \0").split("\0"):
        if lines[-1] and own.getlength(lines[-1] + word) > width:
            lines.append("")
        for letter in word:
            if lines[-1] and own.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _cross(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """Draw a cross that marks an error."""
    for colour, width in ((WHITE, 5), (WRONG, 2)):
        for side in (-1, 1):
            draw.line((x - 5, y - 5 * side, x + 5, y + 5 * side), fill=colour, width=width)


def _line(draw: ImageDraw.ImageDraw, ends: tuple[float, ...], right: bool, width: int) -> None:
    """Draw a line (x0, y0, x1, y1): solid in RIGHT, or broken in WRONG."""
    if right:
        draw.line(ends, fill=RIGHT, width=width)
        return
    start, end = np.array(ends[:2]), np.array(ends[2:])
    parts = np.linspace(0, 1, 2 * max(1, round(float(np.hypot(*(end - start))) / 16)) + 2)
    for first, last in zip(parts[::2], parts[1::2], strict=True):
        draw.line((*(start + first * (end - start)), *(start + last * (end - start))), fill=WRONG, width=width)


def _outlined(image: np.ndarray, patches: Sequence[int], rows: int, columns: int) -> np.ndarray:
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    height, width = image.shape[0] / rows, image.shape[1] / columns
    thick = max(2, image.shape[1] // 200)
    for patch in patches:
        row, column = divmod(patch, columns)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        draw.rectangle(box, outline=(0, 0, 0), width=2 * thick)
        draw.rectangle(box, outline=WHITE, width=thick)
    return np.asarray(drawn)


def draw_pair(dataset: PairDataset, name: str, predicted: dict[str, Any], hits: np.ndarray) -> PictureRow:
    """Draw both images, a line from each point to its prediction, and a ring at the target of a missed one."""
    sample = dataset[dataset.ids.index(name)]
    points = (sample.pair.source_points, predicted["points"], sample.pair.target_points)
    pixels = draw_matches((sample.source_image, sample.target_image), points, hits)
    caption = f"{sample.pair.category}: {int(hits.sum())} of {len(hits)} points"
    return PictureRow(name, caption, [Tile("source and target", pixels, "wide")])


def draw_matches(
    pair: tuple[np.ndarray, np.ndarray],
    points: tuple[np.ndarray, np.ndarray, np.ndarray],
    hits: np.ndarray,
    thickness: int = 4,
) -> np.ndarray:
    """Draw two images (H, W, 3) side by side, with a line from each point to its match, broken if it is wrong.

    Args:
        pair: the images.
        points: (P, 2) each, (x, y) pixels: points in the first image, their matches in the second, and their true
            positions, which get a ring if the match is wrong.
        hits: (P,) bool, whether matches are correct.
        thickness: of the lines, in pixels.
    """
    half = (LARGE // 2, LARGE // 2)
    images = [fitted(image, half, Image.Resampling.BICUBIC) for image in pair]
    scales = [small.shape[1] / image.shape[1] for small, image in zip(images, pair, strict=True)]
    left = images[0].shape[1] + GAP
    drawn = Image.new("RGB", (left + images[1].shape[1], max(i.shape[0] for i in images)), BETWEEN)
    drawn.paste(Image.fromarray(images[0]), (0, 0))
    drawn.paste(Image.fromarray(images[1]), (left, 0))
    draw = ImageDraw.Draw(drawn)

    def dot(x: float, y: float, radius: int, **style: Any) -> None:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), **style)

    for start, match, end, hit in zip(*points, hits, strict=True):
        (x0, y0), (x1, y1), (x2, y2) = start * scales[0], match * scales[1], end * scales[1]
        colour = RIGHT if hit else WRONG
        _line(draw, (x0, y0, left + x1, y1), bool(hit), thickness)
        dot(x0, y0, 5, fill=colour, outline=WHITE)
        dot(left + x1, y1, 5, fill=colour, outline=WHITE)
        if not hit:
            dot(left + x2, y2, 8, outline=WHITE, width=3)
            dot(left + x2, y2, 8, outline=WRONG, width=1)
    return np.asarray(drawn)


def draw_attention(dataset: SegmentationDataset, name: str, predicted: dict[str, Any]) -> PictureRow:
    """Draw the attention of an image, its foreground, and the ground truth."""
    image = fitted(dataset[dataset.ids.index(name)].image, (SMALL, SMALL), Image.Resampling.BICUBIC)
    height, width = image.shape[:2]
    score = predicted["score"]
    maps = {"attention": 255 * score / max(float(score.max()), 1e-12), "foreground": predicted["region"] * 255}
    tiles = [
        Tile("image", image, "photo"),
        Tile("ground truth", class_colours(dataset, enlarged(predicted["truth"], height, width)), "map"),
        *(_grey(title, values, height, width) for title, values in maps.items()),
    ]
    return PictureRow(name, f"Jaccard {100 * predicted['jaccard']:.1f}", tiles)


def draw_boxes(dataset: BoxDataset, name: str, predicted: dict[str, Any], right: bool) -> PictureRow:
    """Draw the boxes of the objects in white, the predicted box (solid if correct), its region, and the features."""
    pixels = dataset.read_image(name)
    image = fitted(pixels, (LARGE // 2, LARGE // 2), Image.Resampling.BICUBIC)
    height, width = image.shape[:2]
    scale = width / pixels.shape[1]
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    for box, right_or_object in [*((own, None) for own in predicted["boxes"]), (predicted["box"], right)]:
        x1, y1, x2, y2 = (float(value) * scale for value in box)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(0, 0, 0), width=5)
        if right_or_object is None:
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=WHITE, width=3)
            continue
        corners = [(x1 + 1, y1 + 1), (x2 - 2, y1 + 1), (x2 - 2, y2 - 2), (x1 + 1, y2 - 2)]
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            _line(draw, (*start, *end), right_or_object, 3)
    score = predicted["score"]
    grey = 255 * (score - score.min()) / max(float(np.ptp(score)), 1e-12)
    tiles = [Tile("image", image, "photo"), Tile("boxes", np.asarray(drawn), "photo")]
    for title, values in {"region": predicted["region"] * 255, "score": grey}.items():
        tiles.append(_grey(title, values, height, width))
    return PictureRow(name, f"IoU {predicted['iou']:.2f}", tiles)


def enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W) integers below 256, or (H, W, 3) colours, by the nearest rule."""
    return np.asarray(Image.fromarray(values.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))


def _grey(title: str, values: np.ndarray, height: int, width: int) -> Tile:
    """Return values (h, w) from 0 to 255 as a grey map."""
    return Tile(title, enlarged(values, height, width)[..., None].repeat(3, 2), "map")


def fitted(pixels: np.ndarray, box: tuple[int, int], rule: Image.Resampling) -> np.ndarray:
    """Resize pixels to the largest size that fits the box (width, height), keeping the aspect ratio."""
    height, width = pixels.shape[:2]
    scale = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, rule))


def thumbnail(tile: Tile) -> np.ndarray:
    """Return a thumbnail (h, w, 3) of a tile, or (h, w, 4) with transparency; for an animation, its middle frame."""
    if tile.kind == "animation":
        return fitted(tile.pixels[len(tile.pixels) // 2], BOX, Image.Resampling.LANCZOS)
    rule = Image.Resampling.NEAREST if tile.kind == "map" else Image.Resampling.LANCZOS
    return fitted(clear(tile), WIDE_BOX if tile.kind == "wide" else BOX, rule)


def clear(tile: Tile) -> np.ndarray:
    """Return the pixels of a tile; with text (H, W, 4), with a transparent background."""
    ground = (tile.pixels == PAPER).all(-1)
    if tile.kind != "wide" or not ground.any():
        return tile.pixels
    return np.concatenate([tile.pixels, np.where(ground, 0, 255).astype(np.uint8)[..., None]], -1)


def font(size: int) -> Any:
    """Return the font of all pictures."""
    return ImageFont.load_default(size)


def encode_image(pixels: np.ndarray, photo: bool) -> bytes:
    """Encode as JPEG for a photo, as PNG for a map, from (H, W, 3) uint8, PNG also from 4."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG" if photo else "PNG", quality=88)
    return buffer.getvalue()


def encode_animation(frames: np.ndarray) -> bytes:
    """Encode frames (T, H, W, 3) as a repeating GIF with 8 frames per second."""
    buffer = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=125, loop=0)
    return buffer.getvalue()


def draw_grid(rows: Sequence[PictureRow], title: str, legend: Sequence[tuple[str, tuple[int, ...]]] = ()) -> np.ndarray:
    """Draw all rows as one picture: headings, name and caption above each row, and the legend below."""
    longest = max(rows, key=lambda row: len(row.tiles))
    small = [[thumbnail(tile) for tile in row.tiles] for row in rows]
    widths = [max([140, *(row[i].shape[1] for row in small if i < len(row))]) + GAP for i in range(len(longest.tiles))]
    lefts = np.cumsum([0, *widths])
    step = BOX[1] + LINE + GAP
    width = max(int(lefts[-1]), round(font(14).getlength(title)) + GAP)
    keys = legend_keys(legend, width)
    top_of_keys = 2 * LINE + len(rows) * step
    height = top_of_keys + (LINE * (keys[-1][0] + 1) if keys else 0)
    grid = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(grid)
    draw.text((2, 2), title, fill=(0, 0, 0), font=font(14))
    for left, tile in zip(lefts[:-1], longest.tiles, strict=True):
        draw.text((left + 2, LINE + 2), tile.title, fill=(90, 90, 90), font=font(13))
    for number, row in enumerate(rows):
        top = 2 * LINE + number * step
        draw.text((2, top + 2), f"{row.name}  {row.caption}", fill=(0, 0, 0), font=font(13))
        for i, picture in enumerate(small[number]):  # a row may have fewer pictures than headings
            shown = Image.fromarray(picture)
            grid.paste(shown, (int(lefts[i]), top + LINE), shown if shown.mode == "RGBA" else None)
    draw_keys(grid, keys, top_of_keys)
    return np.asarray(grid)


Key = tuple[int, int, str, tuple[int, ...]]  # entry of a legend: line, x, name and colour


def legend_keys(legend: Sequence[tuple[str, tuple[int, ...]]], width: int) -> list[Key]:
    """Arrange the entries of a legend in lines of a width."""
    line, x, keys = 0, 2, []
    for name, colour in legend:
        room = 30 + round(font(13).getlength(name))
        if x > 2 and x + room > width:
            line, x = line + 1, 2
        keys.append((line, x, name, colour))
        x += room
    return keys


def draw_keys(picture: Image.Image, keys: Sequence[Key], top: int) -> None:
    """Draw the entries of a legend into a picture."""
    draw = ImageDraw.Draw(picture)
    for line, x, name, colour in keys:
        y = top + line * LINE
        swatch = np.full((13, 13, 3), colour, np.uint8)
        picture.paste(Image.fromarray(hatched(swatch, np.full((13, 13), name == NOT_SCORED))), (x, y + 2))
        draw.rectangle((x, y + 2, x + 13, y + 15), outline=BETWEEN)
        draw.text((x + 18, y + 1), name, fill=(0, 0, 0), font=font(13))
