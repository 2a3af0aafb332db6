"""Topics of short texts, for a sentence encoder: the fortunes of eight topics, tokenised.

    python tests/fortune_topics.py OUT_DIR --tokenizer target/fetched/minilm/tokenizer.json
    python tests/fortune_topics.py OUT_DIR --frozen target/fetched/minilm/model.onnx     # a linear head on the frozen encoder
    python tests/fortune_topics.py OUT_DIR --measure NEW.onnx [--output logits]          # a finetuned network on test.npz

Writes train.npz and test.npz: `input_ids` and `attention_mask` int64 [N, LENGTH], padded with zeros, and `y` int64, the topic.
Every topic has as many texts; no text is in both. Texts come from `tests/fetch.sh`.
"""

import argparse
from pathlib import Path

import numpy as np

FETCHED = Path(__file__).resolve().parent.parent / "target/fetched"
TOPICS = "computers", "definitions", "men-women", "people", "politics", "science", "songs-poems", "work"


def read_texts(path):
    """The texts of one topic, in the file's order, without repeats."""
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n%\n")
    return list(dict.fromkeys(" ".join(t.split()) for t in texts if t.strip()))


def tokenise(path, texts, length):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    codes = tokenizer.encode_batch(texts)
    return np.array([c.ids for c in codes], np.int64), np.array([c.attention_mask for c in codes], np.int64)


def outputs(model, path, output):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    data = np.load(path)
    feeds = {i.name: data[i.name] for i in session.get_inputs()}
    n = len(data["y"])
    parts = [session.run([output], {k: v[i : i + 64] for k, v in feeds.items()})[0] for i in range(0, n, 64)]
    return np.concatenate(parts), data["y"]


def frozen(model, out, output):
    """Accuracy on test.npz of a softmax regression on the encoder's output, trained to convergence."""
    (x, y), (tx, ty) = (outputs(model, out / f"{name}.npz", output) for name in ("train", "test"))
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, tx = (x - mean) / std, (tx - mean) / std
    x, tx = (np.hstack([a, np.ones((len(a), 1))]) for a in (x, tx))
    onehot = np.eye(len(TOPICS))[y]
    best = 0.0
    for decay in (1e-3, 1e-2, 3e-2, 1e-1):
        w = np.zeros((x.shape[1], len(TOPICS)))
        for _ in range(600):
            p = np.exp(x @ w - (x @ w).max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            w -= 0.1 * (x.T @ (p - onehot) / len(x) + decay * w)
        best = max(best, ((tx @ w).argmax(1) == ty).mean())
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-topic", type=int, default=500)
    parser.add_argument("--test", type=float, default=0.3, help="share of each topic's texts")
    parser.add_argument("--length", type=int, default=64, help="tokens a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fortunes", type=Path, default=FETCHED / "fortunes")
    parser.add_argument("--tokenizer", type=Path, default=FETCHED / "minilm/tokenizer.json")
    parser.add_argument("--frozen", metavar="MODEL", help="print the accuracy of a linear head on this encoder")
    parser.add_argument("--measure", metavar="MODEL", help="print this classifier's accuracy on test.npz")
    parser.add_argument("--output", help="name of the output to read")
    args = parser.parse_args()

    if args.frozen:
        print(f"frozen encoder, linear head: {frozen(args.frozen, args.out, args.output or '461'):.4f}")
        return
    if args.measure:
        logits, y = outputs(args.measure, args.out / "test.npz", args.output or "logits")
        print(f"test: {(logits.argmax(1) == y).mean():.4f}")
        return
    rng = np.random.default_rng(args.seed)
    parts = {"train": [], "test": []}
    for label, topic in enumerate(TOPICS):
        texts = read_texts(args.fortunes / topic)
        if len(texts) < args.per_topic:
            raise SystemExit(f"{topic}: only {len(texts)} texts")
        chosen = [texts[i] for i in rng.permutation(len(texts))[: args.per_topic]]
        cut = round(args.test * args.per_topic)
        parts["test"] += [(t, label) for t in chosen[:cut]]
        parts["train"] += [(t, label) for t in chosen[cut:]]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, samples in parts.items():
        ids, mask = tokenise(args.tokenizer, [t for t, _ in samples], args.length)
        np.savez(args.out / f"{name}.npz", input_ids=ids, attention_mask=mask, y=np.array([y for _, y in samples]))
        print(f"{name}: {len(samples)} texts")


if __name__ == "__main__":
    main()
