"""Text lines, upright or upside down, for the PP-OCR direction classifier (48x192, two classes).

    python tests/text_lines.py OUT_DIR --train 500 --test 300 --blur 4 --clean-fraction 0.333 --seed 0
    python tests/text_lines.py OUT_DIR --measure target/fetched/ppocr/cls.onnx

Writes train.npz (blurred, but for a fraction left clean), test.npz (blurred) and test_clean.npz (the same lines, clean), each with
`x` float32 [N,3,48,192], normalised as PP-OCR does, (v/255 - 0.5)/0.5, and `y` int64, 0 = upright, 1 = turned by 180 degrees.
No text is in both train and test. Texts and font come from `tests/fetch.sh`.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FETCHED = Path(__file__).resolve().parent.parent / "target/fetched"
HEIGHT, WIDTH = 48, 192
SIZES = 31, 37  # of the font; the deployed model then reads clean lines well and lines blurred with sigma 4 by chance


def read_texts(folder):
    """Lines of prose out of the fortunes, in a fixed order, without repeats."""
    texts = {}
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file() or path.is_symlink() or path.suffix or "art" in path.name:
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = " ".join(line.split())
            letters = sum(c.isalpha() for c in line)
            if line.isascii() and len(line) >= 24 and letters >= 0.7 * len(line):
                texts[line] = None
    return list(texts)


def render(text, font_path, rng):
    """One line as grey levels [48,192], 0..255, dark on light, and its text, cut at the last word that fits."""
    ground, ink = rng.integers(200, 256), rng.integers(0, 70)
    font = ImageFont.truetype(str(font_path), int(rng.integers(*SIZES)))
    while font.getlength(text) > WIDTH - 8 and " " in text:
        text = text.rsplit(" ", 1)[0]
    left, top, right, bottom = font.getbbox(text)
    slack_x, slack_y = max(WIDTH - (right - left), 0), max(HEIGHT - (bottom - top), 0)
    x = int(rng.integers(2, min(slack_x, 12) + 3)) - left
    y = slack_y // 2 + int(rng.integers(-3, 4)) - top
    image = Image.new("L", (WIDTH, HEIGHT), int(ground))
    ImageDraw.Draw(image).text((x, y), text, fill=int(ink), font=font)
    return np.asarray(image, np.float32), text


def render_lines(texts, count, font_path, rng):
    """`count` lines, no two with the same text."""
    lines = {}
    for i in rng.permutation(len(texts)):
        image, shown = render(texts[i], font_path, rng)
        lines.setdefault(shown, image)
        if len(lines) == count:
            return np.stack(list(lines.values()))
    raise SystemExit(f"only {len(lines)} different texts for {count} lines")


def blur(images, sigma):
    """Gaussian blur of [N,48,192], edges repeated."""
    if sigma <= 0:
        return images
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (radius, radius)
        padded, n = np.pad(images, pad, mode="edge"), images.shape[axis]
        images = sum(k * padded.take(range(i, i + n), axis) for i, k in enumerate(kernel))
    return images


def save(path, images, labels):
    x = (np.round(images) / 255 - 0.5) / 0.5
    x = np.repeat(x[:, None], 3, axis=1).astype(np.float32)
    np.savez(path, x=x, y=labels.astype(np.int64))


def accuracy(model, path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    data = np.load(path)
    x, y = data["x"], data["y"]
    hits = [session.run(None, {name: x[i : i + 50]})[0].argmax(1) == y[i : i + 50] for i in range(0, len(x), 50)]
    return np.concatenate(hits).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--blur", type=float, default=4, help="sigma in pixels")
    parser.add_argument("--clean-fraction", type=float, default=0, help="share of the training lines left clean")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fetched", type=Path, default=FETCHED, help="folder with fortunes/ and fonts/")
    parser.add_argument("--measure", metavar="MODEL", help="print the model's accuracy on each file")
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    texts = read_texts(args.fetched / "fortunes")
    count = args.train + args.test
    clean = render_lines(texts, count, args.fetched / "fonts/DejaVuSans.ttf", rng)
    labels = np.concatenate([rng.permutation(np.arange(n) % 2) for n in (args.train, args.test)])
    clean[labels == 1] = clean[labels == 1, ::-1, ::-1]

    train, test = slice(0, args.train), slice(args.train, count)
    mixed = blur(clean[train], args.blur)
    kept = rng.permutation(args.train)[: round(args.clean_fraction * args.train)]
    mixed[kept] = clean[train][kept]

    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out / "train.npz", mixed, labels[train])
    save(args.out / "test.npz", blur(clean[test], args.blur), labels[test])
    save(args.out / "test_clean.npz", clean[test], labels[test])
    if args.measure:
        for name in ("train", "test", "test_clean"):
            print(f"{name}: {accuracy(args.measure, args.out / f'{name}.npz'):.4f}")


if __name__ == "__main__":
    main()
